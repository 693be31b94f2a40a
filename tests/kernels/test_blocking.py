"""No result depends on how a product is run: on a configuration's blocking, or on how many rows x has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxquant.target import KernelConfig, Problem
from fxquant.tuning.cpu import BY_ROWS, ISA, ROWS, SERIAL, CpuKernel, blockings, cpu_kernel_for, number_of, words_of

PROBLEMS = [
    ("int8/channel", "int8/token"),
    ("int8/channel", "int8/tensor"),
    ("int8/channel", ""),
    ("int4/group32/bf16", "int8/token"),
    ("int4/group32/stepped", "int8/token"),
    ("int4/group128/affine/bf16", ""),
]
# What the products of few rows read from planes, each scheme, and what they leave to tiles: int8, odd groups.
FUSED = [
    ("int4/group32/bf16", "int8/token"),
    ("int4/group24/affine", "int8/token"),
    ("int3/channel", "int8/token"),
    ("int8/group64", "int8/token"),
    ("int4/group20", "int8/token"),
    ("int4/group128/affine/bf16", ""),
    ("int5/group40", ""),
    ("int2/group32/shift", ""),
    ("fp4_e2m1/group16/e4m3", ""),
    ("int4/group12", ""),
    ("int7/channel", ""),
]
BLOCKINGS = [{ROWS: rows, BY_ROWS: by_rows} for rows in (0, 32, 64, 128, 256) for by_rows in (0, 1)]


pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def kernel_of(problem: Problem) -> CpuKernel:
    kernel = cpu_kernel_for(problem)
    assert kernel is not None
    return kernel


@pytest.mark.parametrize(("weights", "activations"), PROBLEMS)
def test_no_blocking_changes_a_bit(weights: str, activations: str, isa: int, threads: int) -> None:
    problem = Problem("linear", 300, 300, 328, weights, activations, "float32")  # enough to be shared out
    kernel = kernel_of(problem)
    args = kernel.operands(problem)
    want = kernel.run(args, isa)
    for blocking in [*BLOCKINGS, {SERIAL: 1}]:
        got = kernel.run(args, number_of(KernelConfig.of(kernel.name, **{ISA: isa, **blocking})))
        assert torch.equal(got, want), blocking


@pytest.mark.parametrize(("weights", "activations"), FUSED)
@pytest.mark.parametrize(("n", "k"), [(64, 480), (192, 484), (70, 37)])
def test_a_row_does_not_depend_on_the_others(weights: str, activations: str, n: int, k: int, isa: int) -> None:
    problem = Problem("linear", 17, n, k, weights, activations, "float32")
    kernel = kernel_of(problem)
    x, *rest = kernel.operands(problem)
    want = kernel.run((x, *rest), isa)
    for rows in range(1, 9):
        assert torch.equal(kernel.run((x[:rows], *rest), isa), want[:rows]), rows


@pytest.mark.parametrize("exponent", [-126, 0, 100])
@pytest.mark.parametrize("weights", ["int4/group64/bf16", "int4/group64/affine/bf16"])
def test_a_row_does_not_depend_on_the_others_at_scales_of_any_size(weights: str, exponent: int, isa: int) -> None:
    problem = Problem("linear", 17, 64, 128, weights, "", "float32")
    kernel = kernel_of(problem)
    x, packed, scale, *rest = kernel.operands(problem)
    args = (packed, scale * 2.0**exponent, *rest)
    want = kernel.run((x, *args), isa)
    assert want.isfinite().all()  # beyond 2**100 digits of x, up to 2**21 times x, may overflow: docs/numbers.md
    assert torch.equal(kernel.run((x[:1], *args), isa), want[:1])


def test_numbers_of_configurations() -> None:
    assert number_of(KernelConfig.of("int8_linear_dynamic", isa=2)) == 2
    config = KernelConfig.of("int8_linear_dynamic", isa=3, rows=64, by_rows=1)
    assert number_of(config) == 3 + 2 * 16 + 128
    assert words_of(config) == "int8_linear_dynamic isa=avx512vnni rows=64 by_rows=1"
    assert number_of(KernelConfig.of("int8_linear_dynamic", isa=0, serial=1)) == 256


def test_a_number_beyond_all_blockings_is_refused() -> None:
    problem = Problem("linear", 2, 64, 32, "int8/channel", "int8/token", "float32")
    kernel = kernel_of(problem)
    with pytest.raises(RuntimeError, match="isa is 512; known are 0"):
        kernel.run(kernel.operands(problem), 512)


def test_blockings_worth_measuring() -> None:
    few = Problem("linear", 1, 1024, 1024, "int8/channel", "int8/token", "float32")
    assert blockings(few, threads=1) == ({},)
    assert blockings(few, threads=2) == ({}, {SERIAL: 1})
    many = few.with_m(1024)
    assert blockings(many, threads=2) == ({}, {ROWS: 64, BY_ROWS: 1}, {ROWS: 128, BY_ROWS: 1})
