"""The float x int8 kernels of the CPU, of floats or of x in fixed point: the answer has a bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.cpu_helpers import (
    DTYPES,
    ISAS,
    SECOND_ORDER,
    SHAPES,
    SMALLEST_HALF_STEP,
    U_OUT,
    Problem,
    U,
    assert_equal,
    assert_within,
    has_isa,
    multiplies_digits,
    problem,
)
from tests.twins import fixed_point_error

ops = torch.ops.fxquant


pytestmark = pytest.mark.usefixtures("kernels")


def check(isa: int, p: Problem, x: Tensor, got: Tensor, bias: Tensor | None) -> None:
    """What the sum may be off, u for the scale and for the bias, u_out for the output.

    The sum is exact but for x, and then rounded; or gamma_K |x| |weight|^T off, where it is one of floats.
    """
    k = p.in_features
    weight = p.codes.double() * p.scale.double()
    product = x.double() @ weight.t()
    want = product if bias is None else product + bias.double()
    of_floats = k * U / (1 - k * U) * (x.double().abs() @ weight.abs().t())
    off = fixed_point_error(x, weight) + U * product.abs() if multiplies_digits(isa) else of_floats
    bound = off + U * product.abs() + (U + U_OUT[x.dtype]) * want.abs()
    assert got.dtype == x.dtype
    assert_within(got, want, SECOND_ORDER * bound + SMALLEST_HALF_STEP[x.dtype])


def fixed_point_isas(fewest: int) -> list[int]:
    """The instruction sets of this CPU that take x in fixed point, or a skip where there are fewer."""
    able = [isa for isa in ISAS if isa and has_isa(isa) and multiplies_digits(isa)]
    if len(able) < fewest:
        pytest.skip(f"{len(able)} instruction sets of this CPU take x in fixed point, {fewest} are needed")
    return able


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_stay_in_the_derived_bound(isa: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    p = problem(n, k, seed=31, exact=False)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(32)).to(dtype)
    check(isa, p, x, ops.int8_linear_weight_only(x, p.packed, p.scale, p.bias, k, isa), p.bias)


@pytest.mark.parametrize("rows", [1, 5, 97])
def test_exact_where_float32_holds_every_sum(isa: int, rows: int) -> None:
    """Integers below 2**24 in all partial sums, and power-of-two scales: no rounding in any order."""
    p = problem(70, 300, seed=33, exact=True)
    x = torch.randint(-127, 128, (rows, 300), generator=torch.Generator().manual_seed(34)).float()
    want = (x.double() @ p.codes.double().t()) * p.scale.double().t() + p.bias.double()
    assert_equal(ops.int8_linear_weight_only(x, p.packed, p.scale, p.bias, 300, isa), want.float())


@pytest.mark.parametrize("rows", [1, 2])
def test_large_values_give_the_bits_of_small_ones(isa: int, rows: int) -> None:
    """Sums may be kept as multiples of themselves where these do not overflow; x is counted in a power of two."""
    p = problem(70, 300, seed=44, exact=True)
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(45))
    small = ops.int8_linear_weight_only(x, p.packed, p.scale, None, 300, isa)
    assert_equal(ops.int8_linear_weight_only(x * 2.0**90, p.packed, p.scale, None, 300, isa), small * 2.0**90)


@pytest.mark.parametrize("bias_dtype", [*DTYPES, None], ids=str)
def test_bias_of_any_float_type(isa: int, bias_dtype: torch.dtype | None) -> None:
    p = problem(70, 40, seed=35, exact=False)
    bias = None if bias_dtype is None else p.bias.to(bias_dtype)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(36))
    check(isa, p, x, ops.int8_linear_weight_only(x, p.packed, p.scale, bias, 40, isa), bias)


@pytest.mark.parametrize(("rows", "k"), [(2, 70_001), (100, 70_001), (2, 131_077)])  # and beyond int32
def test_a_long_sum(isa: int, rows: int, k: int) -> None:
    p = problem(3, k, seed=37, exact=False)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(38))
    check(isa, p, x, ops.int8_linear_weight_only(x, p.packed, p.scale, None, k, isa), None)


def test_half_floats_and_integers_make_the_sum_itself() -> None:
    """x in fixed point holds a bfloat16 down to 2**-7 of the row's largest: float64's sum, rounded once, on each."""
    p, generator = problem(70, 300, seed=46, exact=True), torch.Generator().manual_seed(47)
    x = torch.randn(9, 300, generator=generator).bfloat16()
    x[x.abs() < 2.0**-5] = 0
    want = (x.double() @ p.codes.double().t()).float() * p.scale.t()
    for isa in fixed_point_isas(1):
        got = ops.int8_linear_weight_only(x, p.packed, p.scale, None, 300, isa)
        assert_equal(got, want.bfloat16())


def test_instruction_sets_that_take_x_in_fixed_point_give_the_same_bits() -> None:
    p = problem(200, 333, seed=48, exact=False)
    x = torch.randn(40, 333, generator=torch.Generator().manual_seed(49))
    first, *rest = [ops.int8_linear_weight_only(x, p.packed, p.scale, p.bias, 333, isa) for isa in fixed_point_isas(2)]
    for other in rest:
        assert_equal(other, first)


def test_heights_give_the_same_rows(isa: int) -> None:
    """A row's bits do not depend on how many rows stand beside it: its sums are exact, or in the order of k."""
    p = problem(70, 333, seed=39, exact=False)
    x = torch.randn(130, 333, generator=torch.Generator().manual_seed(40))
    whole = ops.int8_linear_weight_only(x, p.packed, p.scale, p.bias, 333, isa)
    for rows in (1, 6, 7, 96):
        assert_equal(ops.int8_linear_weight_only(x[:rows], p.packed, p.scale, p.bias, 333, isa), whole[:rows])


def test_x_of_any_layout() -> None:
    p = problem(70, 33, seed=41, exact=False)
    x = torch.randn(4, 6, 40, generator=torch.Generator().manual_seed(42))
    for view in (x[..., :33], x.transpose(0, 1)[..., :33], x[1, :, 3:36], x[:, ::2, 7:], x[0, 0, :33]):
        want = ops.int8_linear_weight_only(view.contiguous(), p.packed, p.scale, p.bias, 33)
        assert_equal(ops.int8_linear_weight_only(view, p.packed, p.scale, p.bias, 33), want)


def test_non_finite_x_stays_in_its_row(isa: int) -> None:
    p = problem(70, 33, seed=43, exact=False)
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(44))
    x[2, 32], x[5, 0] = float("nan"), float("inf")
    got = ops.int8_linear_weight_only(x, p.packed, p.scale, p.bias, 33, isa)
    want = reference.int8_linear_weight_only(x, p.packed, p.scale, p.bias, 33)
    assert got[2].isnan().all()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    finite = [row for row in range(9) if row not in (2, 5)]
    assert got[finite].isfinite().all()
