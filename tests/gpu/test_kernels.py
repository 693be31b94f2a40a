"""Every Triton kernel on the GPU that is here: numbers in each dtype, codes bit for bit."""

from __future__ import annotations

import pytest
import torch

from fxquant.target import Arch, Problem
from fxquant.triton_kernels.launching import interpreted
from tests.gpu import kernels as checks

pytestmark = pytest.mark.skipif(interpreted(), reason="kernels of the interpreter do not run on a GPU")
DTYPES = ("float16", "bfloat16", "float32")
SIDES = [pytest.param(sides, id=" x ".join(filter(None, sides))) for sides in checks.SIDES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", SIDES)
def test_linear(sides: tuple[str, str], dtype: str, arch: Arch, device: torch.device) -> None:
    for problem in checks.linear_problems(sides, dtype):
        for kernel in checks.kernels_that_take(problem, arch):
            checks.check_linear(problem, kernel.heuristic(problem, arch), arch, device)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("sides", SIDES)
def test_linear_with_epilogue(sides: tuple[str, str], activation: str, arch: Arch, device: torch.device) -> None:
    problem = Problem("linear", 33, 130, 512, sides[1], sides[0], "bfloat16")
    for kernel in checks.kernels_that_take(problem, arch):
        config = kernel.heuristic(problem, arch)
        checks.check_linear(problem, config, arch, device, activation=activation, residual=True)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 16, 100, 2000])
@pytest.mark.parametrize("sides", SIDES)
def test_every_candidate_of_a_linear(sides: tuple[str, str], m: int, arch: Arch, device: torch.device) -> None:
    problem = Problem("linear", m, 272, 1056, sides[1], sides[0], "bfloat16")
    for kernel in checks.kernels_that_take(problem, arch):
        for config in kernel.candidates(problem, arch):
            checks.check_linear(problem, config, arch, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", checks.QUANTIZED)
def test_quantize(spec: str, dtype: str, arch: Arch, device: torch.device) -> None:
    for m, k in ((1, 64), (7, 333), (40, 4096), (5, 20000)):
        problem = Problem("quantize", m, 0, k, "", spec, dtype)
        for kernel in checks.kernels_that_take(problem, arch):
            for config in kernel.candidates(problem, arch):
                checks.check_quantize(checks.rows_to_quantize(m, k, dtype), spec, config, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", checks.QUANTIZED)
def test_quantize_every_half(spec: str, dtype: torch.dtype, arch: Arch, device: torch.device) -> None:
    x = checks.every_number(dtype)
    m, k = x.shape
    problem = Problem("quantize", m, 0, k, "", spec, str(dtype).removeprefix("torch."))
    for kernel in checks.kernels_that_take(problem, arch):
        checks.check_quantize(x, spec, kernel.heuristic(problem, arch), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_quantize_behind_a_norm(norm: str, dtype: str, arch: Arch, device: torch.device) -> None:
    for m, k in ((1, 64), (7, 333), (40, 4096), (5, 20000)):
        problem = Problem("quantize", m, 0, k, "", "int8/token", dtype, norm)
        for kernel in checks.kernels_that_take(problem, arch):
            for config in kernel.candidates(problem, arch):
                checks.check_normed(checks.rows_to_quantize(m, k, dtype), norm, config, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["int8/tensor", "float8_e4m3fn/tensor"])
def test_quantize_by_a_given_scale(spec: str, dtype: str, arch: Arch, device: torch.device) -> None:
    problem = Problem("quantize", 7, 0, 333, "", spec, dtype, "static")
    for kernel in checks.kernels_that_take(problem, arch):
        config = kernel.heuristic(problem, arch)
        checks.check_static(checks.rows_to_quantize(7, 333, dtype), spec, 0.03, config, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", checks.TABLES)
def test_embedding(spec: str, dtype: str, arch: Arch, device: torch.device) -> None:
    problem = Problem("embedding", 5, 37, 200, spec, "", dtype)
    for kernel in checks.kernels_that_take(problem, arch):
        for config in kernel.candidates(problem, arch):
            checks.check_embedding(spec, getattr(torch, dtype), config, device)
