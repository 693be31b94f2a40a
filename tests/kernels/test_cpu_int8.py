"""The int8 x int8 kernels of the CPU, on every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.cpu_helpers import (
    DTYPES,
    SECOND_ORDER,
    SHAPES,
    SMALLEST_HALF_STEP,
    U_OUT,
    Problem,
    U,
    assert_equal,
    assert_within,
    problem,
    product64,
)

ops = torch.ops.fxquant


pytestmark = pytest.mark.usefixtures("kernels")


def exact_x(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Rows whose scale is 2**-4: integers to +-127, one of them 127, times 2**-4. All three dtypes hold them."""
    x = torch.randint(-127, 128, (rows, k), generator=torch.Generator().manual_seed(seed)).float()
    if k:
        x[:, -1] = 127.0
    return (x * 2.0**-4).to(dtype)


def rounding_bound(y: Tensor, product: Tensor, dtype: torch.dtype) -> Tensor:
    """3u |x_scale * scale * sum| + u |y| + u_out |y|: conversion, two products, the bias, the output."""
    return SECOND_ORDER * (3 * U * product.abs() + (U + U_OUT[dtype]) * y.abs()) + SMALLEST_HALF_STEP[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_is_exact_with_power_of_two_scales(isa: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    p, x = problem(n, k, seed=2, exact=True), exact_x(m, k, dtype)
    got = ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias, k, isa)
    want = product64(x.double() * 16, p.codes) * 2.0**-4 * p.scale.double().t() + p.bias.double()
    assert_equal(got, want.float().to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_input_is_exact_with_power_of_two_scales(isa: int, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    p = problem(n, k, seed=3, exact=True)
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    x_scale = torch.exp2(torch.randint(-5, 3, (m, 1), generator=generator).float())
    want = product64(codes, p.codes) * x_scale.double() * p.scale.double().t()
    for dtype in DTYPES:
        got = ops.int8_linear(codes, x_scale, p.packed, p.scale, None, k, dtype, isa)
        assert_equal(got, want.float().to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_stays_in_the_derived_bound(isa: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    p = problem(n, k, seed=5, exact=False)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(6)).to(dtype)
    codes, x_scale = reference.int8_quantize_per_token(x)
    product = product64(codes, p.codes) * x_scale.double() * p.scale.double().t()
    want = product + p.bias.double()
    got = ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias, k, isa)
    assert got.dtype == dtype
    assert_within(got, want, rounding_bound(want, product, dtype))


def test_kernel_and_reference_are_bit_equal(isa: int) -> None:
    p = problem(70, 130, seed=7, exact=False)
    x = torch.randn(19, 130, generator=torch.Generator().manual_seed(8))
    for dtype in DTYPES:
        want = reference.int8_linear_dynamic(x.to(dtype), p.packed, p.scale, p.bias, 130)
        assert_equal(ops.int8_linear_dynamic(x.to(dtype), p.packed, p.scale, p.bias, 130, isa), want)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_of_any_float_type(isa: int, bias_dtype: torch.dtype) -> None:
    p, x = problem(70, 40, seed=9, exact=True), exact_x(5, 40, torch.float32)
    bare = ops.int8_linear_dynamic(x, p.packed, p.scale, None, 40, isa)
    got = ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias.to(bias_dtype), 40, isa)
    assert_equal(got, bare + p.bias)  # the bias is a small integer: every dtype holds it


@pytest.mark.parametrize("k", [66_001, 131_072, 140_001])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_beyond_int32(isa: int, k: int, sign: int) -> None:
    """All codes at their ends: from 66 312 on u8 * s8 sums leave int32, from 133 145 on those of int8 * int8 do."""
    p = problem(65, k, seed=10, exact=True)
    codes = torch.full((65, k), 127, dtype=torch.int8)
    codes[1] = p.codes[1]
    packed = ops.int8_pack(codes)
    x = torch.full((20, k), 127 * sign, dtype=torch.int8)
    x[1, ::3] = -5
    one = torch.ones(20, 1)
    got = ops.int8_linear(x, one, packed, p.scale, None, k, torch.float32, isa)
    assert_equal(got, (product64(x, codes) * p.scale.double().t()).float())
    assert_equal(got, reference.int8_linear(x, one, packed, p.scale, None, k, torch.float32))


LAYOUTS = {
    "row stride": lambda x: x.repeat(1, 2)[:, : x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "column stride": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "one row expanded": lambda x: x[:1].expand(x.shape[0], -1),
    "three dimensions": lambda x: x.reshape(2, -1, x.shape[1]),
    "three dimensions, narrow": lambda x: x.repeat(1, 2).reshape(2, -1, 2 * x.shape[1])[..., : x.shape[1]],
    "three dimensions, swapped": lambda x: x.reshape(2, -1, x.shape[1]).transpose(0, 1),
    "one dimension": lambda x: x[3],
    "offset by one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "unit sizes": lambda x: x[:, None, None, :].transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_of_x(layout: str, dtype: torch.dtype) -> None:
    p = problem(70, 33, seed=11, exact=False)
    x = LAYOUTS[layout](torch.randn(8, 33, generator=torch.Generator().manual_seed(12)).to(dtype))
    want = ops.int8_linear_dynamic(x.contiguous(), p.packed, p.scale, p.bias, 33)
    got = ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias, 33)
    assert got.is_contiguous()
    assert got.shape == (*x.shape[:-1], 70)
    assert_equal(got, want)
    codes, x_scale = ops.int8_quantize_per_token(x)
    want_codes, want_scale = reference.int8_quantize_per_token(x)
    assert_equal(codes, want_codes)
    assert_equal(x_scale, want_scale)
    assert_equal(ops.int8_linear(codes, x_scale, p.packed, p.scale, p.bias, 33, dtype), want)


def test_codes_that_are_not_contiguous() -> None:
    p = problem(70, 33, seed=13, exact=True)
    codes = torch.randint(-127, 128, (33, 8), dtype=torch.int8).t()
    one = torch.ones(8, 1)
    got = ops.int8_linear(codes, one, p.packed, p.scale, None, 33, torch.float32)
    assert_equal(got, ops.int8_linear(codes.contiguous(), one, p.packed, p.scale, None, 33, torch.float32))


def special_rows(k: int) -> Tensor:
    nan, inf = float("nan"), float("inf")
    values = torch.randn(14, k, generator=torch.Generator().manual_seed(14))
    values[1] = 0.0
    values[2, k // 2] = nan
    values[3, k - 1] = inf
    values[4, 0] = -inf
    values[5] *= 2.0**-118 / values[5].abs().max()
    values[6] *= 2.0**-119 / values[6].abs().max()
    values[7] *= 2.0**-120 / values[7].abs().max()
    values[8] = 2.0**-149  # the smallest subnormal
    values[9] = torch.finfo(torch.float32).max
    values[10] = torch.arange(k) + 0.5
    values[10, 0] = 127.0  # scale 1: every other value is a tie
    values[11] = -0.0
    values[12, ::2] = nan
    values[12, 1::2] = -inf
    return values


@pytest.mark.parametrize("k", [1, 4, 15, 16, 17, 33, 100, 254])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_equal_the_numerics(k: int, dtype: torch.dtype) -> None:
    for x in (special_rows(k).to(dtype), torch.randn(40, k, generator=torch.Generator().manual_seed(k)).to(dtype)):
        codes, scale = ops.int8_quantize_per_token(x)
        want_codes, want_scale = reference.int8_quantize_per_token(x)
        assert_equal(codes, want_codes)
        assert_equal(scale, want_scale)


def test_special_rows_through_the_linear(isa: int) -> None:
    p = problem(70, 33, seed=15, exact=False)
    x = special_rows(33)
    got = ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias, 33, isa)
    assert_equal(got, reference.int8_linear_dynamic(x, p.packed, p.scale, p.bias, 33))
    assert got[[2, 3, 4, 12]].isnan().all()
    assert_equal(got[1], p.bias)


def test_non_finite_scale_or_bias_of_a_column_stays_there(isa: int) -> None:
    p = problem(70, 33, seed=16, exact=False)
    scale, bias = p.scale.clone(), p.bias.clone()
    scale[3], bias[66] = float("nan"), float("inf")
    x = exact_x(9, 33, torch.float32)
    got = ops.int8_linear_dynamic(x, p.packed, scale, bias, 33, isa)
    assert got[:, 3].isnan().all()
    assert got[:, 66].isinf().all()
    others = [c for c in range(70) if c not in (3, 66)]
    assert_equal(got[:, others], ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias, 33, isa)[:, others])


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 65), (64, 4), (65, 7), (200, 33), (0, 5), (5, 0), (130, 257), (129, 513)], ids=str
)
def test_packing_equals_the_reference(shape: tuple[int, int]) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    assert_equal(ops.int8_pack(codes), reference.int8_pack(codes))
    assert_equal(ops.int8_pack(codes.t()), reference.int8_pack(codes.t()))


@pytest.mark.parametrize("shape", [(1, 6000, 700), (5, 6000, 700), (50, 3000, 700), (600, 900, 300)], ids=str)
def test_threads_do_not_change_a_bit(threads: None, isa: int, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    p = problem(n, k, seed=17, exact=False)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(18))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        codes, x_scale = ops.int8_quantize_per_token(x)
        results.append(
            (
                ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias, k, isa),
                ops.int8_linear(codes, x_scale, p.packed, p.scale, p.bias, k, torch.float32, isa),
                ops.int8_linear_weight_only(x, p.packed, p.scale, p.bias, k, isa),
            )
        )
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_equal(got, want)
    assert_equal(results[0][0], results[0][1])


def test_no_output_features(threads: None) -> None:
    """Sharing no blocks among several threads once divided by zero, which ends the process."""
    torch.set_num_threads(2)
    packed, scale, x = ops.int8_pack(torch.empty(0, 8, dtype=torch.int8)), torch.empty(0, 1), torch.ones(3, 8)
    for op in (ops.int8_linear_dynamic, ops.int8_linear_weight_only):
        assert op(x, packed, scale, None, 8).shape == (3, 0)


def test_packed_codes_at_an_odd_address(isa: int) -> None:
    """A weight mapped from a file stands wherever the file puts it."""
    p, x = problem(70, 33, seed=19, exact=True), exact_x(7, 33, torch.float32)
    shifted = torch.cat([p.packed.new_zeros(1), p.packed.flatten()])[1:].view(p.packed.shape)
    assert shifted.data_ptr() % 4 == 1
    want = ops.int8_linear_dynamic(x, p.packed, p.scale, None, 33, isa)
    assert_equal(ops.int8_linear_dynamic(x, shifted, p.scale, None, 33, isa), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 33), (2, 0, 33), (33,)], ids=str)
def test_opcheck_with_the_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Fakes, strides and functionalization agree with the kernels, as they do with the references in test_ops."""
    p, x = problem(70, 33, seed=22, exact=False), torch.randn(shape).to(dtype)
    codes, x_scale = reference.int8_quantize_per_token(x)
    torch.library.opcheck(ops.int8_pack.default, (p.codes,))
    torch.library.opcheck(ops.int8_quantize_per_token.default, (x,))
    torch.library.opcheck(ops.int8_linear_dynamic.default, (x, p.packed, p.scale, p.bias, 33))
    torch.library.opcheck(ops.int8_linear_weight_only.default, (x, p.packed, p.scale, None, 33))
    torch.library.opcheck(ops.int8_linear.default, (codes, x_scale, p.packed, p.scale, None, 33, dtype))


def call(p: Problem, x: Tensor, **change: object) -> Tensor:
    arguments = {"packed": p.packed, "scale": p.scale, "bias": None, "in_features": p.in_features, "isa": 0} | change
    return ops.int8_linear_dynamic(x, *arguments.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"isa": 9}, "isa is 9; known are 0"),
        ({"in_features": 32}, "x has 33 features, in_features is 32"),
        ({"in_features": 0}, "in_features is 0; 1 to 16777216 are taken"),
        ({"scale": torch.ones(65, 1)}, r"packed is not what int8_pack makes of \[65, 33\]"),
        ({"scale": torch.ones(64, 1, dtype=torch.float64)}, "scale is Double; scales are float32"),
        ({"bias": torch.ones(3)}, "bias has 3 values for 64 output features"),
        ({"bias": torch.ones(64, dtype=torch.int32)}, "bias is Int; float32, bfloat16 and float16 are taken"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, object], words: str) -> None:
    p = problem(64, 33, seed=20, exact=True)
    with pytest.raises(RuntimeError, match=words):
        call(p, torch.ones(2, 33), **change)


def test_float64_is_refused() -> None:
    p = problem(64, 33, seed=21, exact=True)
    with pytest.raises(RuntimeError, match="x is Double; float32, bfloat16 and float16 are taken: cast it"):
        call(p, torch.ones(2, 33, dtype=torch.float64))
