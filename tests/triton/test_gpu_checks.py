"""The checks of `tests/gpu` by the interpreter, on the CPU and small: what a GPU will run is run here before."""

from __future__ import annotations

import pytest
import torch

from fxquant.target import ARCHS, Problem
from tests.gpu import kernels as checks

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")
# NVFP4 by its own kernel is among what the interpreter gets wrong.
SIDES = [sides for sides in checks.SIDES if "e4m3" not in sides[0].split("/")]


def small(sides: tuple[str, str], m: int = 3) -> Problem:
    return checks.linear_problems(sides, "float16", ((m, 17, 70),))[0]


@pytest.mark.parametrize("sides", SIDES, ids=[" x ".join(filter(None, sides)) for sides in SIDES])
def test_linear(sides: tuple[str, str]) -> None:
    arch = ARCHS["sm100" if sides[0].endswith("e8m0") else "sm90"]
    problem = small(sides)
    able = checks.kernels_that_take(problem, arch)
    assert able
    for kernel in able:
        checks.check_linear(problem, kernel.heuristic(problem, arch), arch, CPU, activation="silu", residual=True)


@pytest.mark.parametrize("spec", checks.QUANTIZED)
def test_quantize(spec: str) -> None:
    problem = Problem("quantize", 7, 0, 333, "", spec, "float16")
    kernel = checks.kernels_that_take(problem, ARCHS["sm90"])[0]
    config = kernel.heuristic(problem, ARCHS["sm90"])
    checks.check_quantize(checks.rows_to_quantize(7, 333, "float16"), spec, config, CPU)


def test_quantize_otherwise() -> None:
    x = checks.rows_to_quantize(7, 333, "float16")
    arch = ARCHS["sm90"]
    problem = Problem("quantize", 7, 0, 333, "", "int8/token", "float16")
    kernel = checks.kernels_that_take(problem, arch)[0]
    config = kernel.heuristic(problem, arch)
    checks.check_static(x, "int8/tensor", 0.03, config, CPU)
    for norm in ("rmsnorm", "layernorm"):
        checks.check_normed(x, norm, config, CPU)
    some = checks.every_number(torch.float16)
    assert some.isfinite().all()
    checks.check_quantize(some[::64], "float8_e4m3fn/token", config, CPU)


@pytest.mark.parametrize("spec", checks.TABLES)
def test_embedding(spec: str) -> None:
    problem = Problem("embedding", 5, 37, 200, spec, "", "float16")
    kernel = checks.kernels_that_take(problem, ARCHS["sm90"])[0]
    checks.check_embedding(spec, torch.float16, kernel.heuristic(problem, ARCHS["sm90"]), CPU)
