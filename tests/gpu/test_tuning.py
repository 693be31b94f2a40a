"""Tuning measured on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.target import Arch, Problem, Target
from tests.gpu import kernels, tuning


@pytest.mark.parametrize("sides", kernels.SIDES, ids=[" x ".join(filter(None, sides)) for sides in kernels.SIDES])
def test_linears(sides: tuple[str, str], arch: Arch, device: torch.device, tmp_path: Path) -> None:
    problems = [Problem("linear", m, 512, 1024, sides[1], sides[0], "bfloat16") for m in (1, 16, 512)]
    taken = [problem for problem in problems if kernels.kernels_that_take(problem, arch)]
    if not taken:
        pytest.skip(f"{arch} has no kernel for it")
    tuning.check_tuning(taken, Target.of_this_machine(device), tmp_path)


@pytest.mark.parametrize("extra", ["", "rmsnorm", "layernorm"])
def test_quantize(extra: str, device: torch.device, tmp_path: Path) -> None:
    problems = [Problem("quantize", m, 0, 4096, "", "int8/token", "bfloat16", extra) for m in (1, 512)]
    tuning.check_tuning(problems, Target.of_this_machine(device), tmp_path)


def test_embedding(device: torch.device, tmp_path: Path) -> None:
    problems = [Problem("embedding", 16, 1000, 512, "int4/group128/affine/bf16", "", "bfloat16")]
    tuning.check_tuning(problems, Target.of_this_machine(device), tmp_path)
