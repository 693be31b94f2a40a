"""The checks of `tests/gpu` on the CPU: what a GPU will run is run here before, with the CPU in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.spec import PRESETS
from fxquant.target import Problem, Target
from tests.gpu import models, ops, tuning

CPU = torch.device("cpu")
EAGER = {"executor": "eager"}


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
    models.check_preset(preset, CPU, torch.float32, 32, **EAGER)
    models.check_preset(preset, CPU, torch.bfloat16, 32, dynamic=True, **EAGER)


@pytest.mark.usefixtures("fresh_dynamo")
def test_replays() -> None:
    models.check_replays("int8dq", CPU, torch.float32, 32, **EAGER)


@pytest.mark.parametrize("preset", PRESETS)
def test_modules_move(preset: str) -> None:
    models.check_moves(preset, CPU, 32)


def test_memory_while_quantizing() -> None:
    models.check_memory("int8wo", CPU, 128, lambda: 0)


def test_tuning(tmp_path: Path) -> None:
    target = Target.of_this_machine("cpu")
    if not target.has_kernels:
        pytest.skip("no compiler for the CPU's kernels")
    tuning.check_tuning([Problem("linear", 2, 64, 64, "int8/channel", "", "float32")], target, tmp_path)
