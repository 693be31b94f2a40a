"""The checks of `tests/gpu` on the CPU: what a GPU will run is run here before, with the CPU in its place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.numerics import granules
from fxquant.spec import PRESETS
from fxquant.target import Problem, Target
from tests.gpu import models, ops, tuning

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ops.CASES)
def test_op(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ops.check_op(name, dtype, CPU)


def test_every_op_has_a_case() -> None:
    declared = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("fxquant::") for name in declared if name.startswith("fxquant::")} == set(ops.CASES)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "preset", ["int8dq", *(pytest.param(preset, marks=pytest.mark.slow) for preset in PRESETS if preset != "int8dq")]
)
def test_compiled(preset: str) -> None:
    models.check_preset(preset, CPU, torch.float32, 32, executor="eager")
    models.check_preset(preset, CPU, torch.bfloat16, 32, dynamic=True, executor="eager")


@pytest.mark.usefixtures("fresh_dynamo")
def test_replays() -> None:
    models.check_replays("int8dq", CPU, torch.float32, 32, executor="eager")


@pytest.mark.parametrize("preset", PRESETS)
def test_modules_move(preset: str) -> None:
    models.check_moves(preset, CPU, 32)


def peak_of(run: Callable[[], None]) -> int:
    """Bytes of CPU memory, as torch's profiler sees them come and go."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events: Any = profile.profiler
    steps = [event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]"]
    assert steps
    return max(itertools.accumulate(steps))


@pytest.mark.parametrize("preset", ["int8wo", "int4wo", "mxfp4wo"])
def test_memory_while_quantizing(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a device would: in blocks of its size."""
    monkeypatch.setattr(granules, "CPU_BLOCK", granules.DEVICE_BLOCK)
    models.check_memory(preset, CPU, 512, peak_of)


def test_tuning(tmp_path: Path) -> None:
    target = Target.of_this_machine("cpu")
    if not target.has_kernels:
        pytest.skip("no compiler for the CPU's kernels")
    tuning.check_tuning([Problem("linear", 2, 64, 64, "int8/channel", "", "float32")], target, tmp_path)
