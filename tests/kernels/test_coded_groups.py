"""linear_dynamic of x in groups: what shares a scale on both sides is summed up exactly, the rest in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.coded_problems import Coded, coded
from tests.kernels.cpu_helpers import (
    DTYPES,
    ISAS,
    SECOND_ORDER,
    SMALLEST_HALF_STEP,
    U_OUT,
    U,
    assert_equal,
    assert_within,
    has_isa,
)

ops = torch.ops.fxquant


pytestmark = pytest.mark.usefixtures("kernels")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grouped(p: Coded, op: object, x: Tensor, x_group: int, dtype: torch.dtype = torch.float32, isa: int = 0) -> Tensor:
    arguments = (x, *p.packed, p.bias, *p.sizes, p.text, dtype, isa)
    return op(*arguments, x_group=x_group)  # pyright: ignore[reportCallIssue]


def check(p: Coded, x: Tensor, x_group: int, isa: int) -> None:
    """Each sum: conversion and two scales; then a float32 sum over them: gamma_(G + 3)."""
    codes, scale, _ = reference.quantize_dynamic(x, f"int8/group{x_group}")
    k = p.sizes[1]
    groups = torch.arange(k) // x_group
    rounded = codes.double() * scale.double()[:, groups]
    value = p.terms()[0]
    ends = {*range(0, k, x_group), *range(0, k, min(p.spec.granularity.size or k, k)), k}
    pieces = [slice(a, b) for a, b in zip(sorted(ends), sorted(ends)[1:], strict=False)]
    products = torch.stack([rounded[:, s] @ value[:, s].t() for s in pieces], -1)
    want = products.sum(-1) + p.bias.double()
    steps = len(pieces) + 3
    bound = steps * U / (1 - steps * U) * products.abs().sum(-1) + (U + U_OUT[x.dtype]) * want.abs()
    bound = SECOND_ORDER * bound + SMALLEST_HALF_STEP[x.dtype]
    for op, which in ((ops.linear_dynamic, isa), (reference.linear_dynamic, 0)):
        got = grouped(p, op, x, x_group, x.dtype, which)
        assert got.dtype == x.dtype
        assert_within(got, want, bound)


@pytest.mark.parametrize("text", ["int8/group32", "int4/group32/bf16", "int8/channel", "int5/group20/affine"])
@pytest.mark.parametrize("x_group", [4, 12, 32, 112, 128, 256, 260, 4096])  # 112: short pieces between whole ones
@pytest.mark.parametrize("k", [1, 31, 160, 1000])
def test_groups_of_any_size_on_either_side(isa: int, text: str, x_group: int, k: int) -> None:
    check(coded(text, 70, k, seed=1), normal(7, k, seed=2), x_group, isa)


@pytest.mark.parametrize("m", [1, 2, 6, 13, 259])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_number_and_dtype(isa: int, m: int, dtype: torch.dtype) -> None:
    for text, x_group in (("int8/group128", 128), ("int4/group32", 32), ("int8/group32/affine", 64)):
        check(coded(text, 129, 264, seed=3), normal(m, 264, seed=m, dtype=dtype), x_group, isa)


@pytest.mark.parametrize("text", ["int4/group32/bf16", "int8/channel", "int8/group20/affine"])
@pytest.mark.parametrize("rows", [1, 7, 97])
@pytest.mark.parametrize("x_group", [8, 32, 60])
def test_exact_with_power_of_two_scales(isa: int, text: str, rows: int, x_group: int) -> None:
    """The largest value of a group is 127 steps: its scale is the step, and the codes are what x is made of."""
    p = coded(text, 70, 120, seed=4, exact=True)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-127, 128, (rows, 120), generator=generator).float()
    codes[:, ::x_group] = 127.0
    steps = torch.exp2(torch.randint(-4, -1, (rows, -(-120 // x_group)), generator=generator).float())
    x = codes * steps.repeat_interleave(x_group, 1)[:, :120]
    want = x.double() @ p.terms()[0].t() + p.bias.double()
    assert_equal(grouped(p, ops.linear_dynamic, x, x_group, isa=isa), want.float())
    assert_equal(grouped(p, reference.linear_dynamic, x, x_group), want.float())


@pytest.mark.parametrize("x_group", [32, 128, 60])
def test_heights_give_the_same_rows(isa: int, x_group: int) -> None:
    p = coded("int8/group32", 70, 333, seed=6)
    x = normal(259, 333, seed=7)
    whole = grouped(p, ops.linear_dynamic, x, x_group, isa=isa)
    for rows in (1, 2, 6, 7, 97, 256):
        assert_equal(grouped(p, ops.linear_dynamic, x[:rows], x_group, isa=isa), whole[:rows])


def test_instruction_sets_with_a_fused_product_give_the_same_bits() -> None:
    isas = [isa for isa in ISAS if isa > 1 and has_isa(isa)]
    if len(isas) < 2:
        pytest.skip("this CPU has at most one of these instruction sets")
    for text, x_group in (("int8/group128", 128), ("int4/group32/affine", 32), ("int8/channel", 12)):
        p, x = coded(text, 129, 264, seed=8), normal(13, 264, seed=9)
        first, *rest = (grouped(p, ops.linear_dynamic, x, x_group, isa=isa) for isa in isas)
        for other in rest:
            assert_equal(other, first)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("text", ["int8/channel", "int8/group100000/affine"])
def test_sums_at_the_ends_of_int32(isa: int, text: str, sign: int) -> None:
    k = 140_001
    plain = coded(text, 3, k, seed=10, exact=True)
    codes = torch.full_like(plain.codes, 255 if plain.zero_point is not None else 127)
    zero_point = None if plain.zero_point is None else torch.zeros_like(plain.zero_point)
    p = Coded(plain.spec, codes, plain.scale, zero_point, None, torch.zeros(3))
    x = torch.full((2, k), 127.0 * sign)
    got = grouped(p, ops.linear_dynamic, x, 80_000, isa=isa)
    assert_equal(got, grouped(p, reference.linear_dynamic, x, 80_000))
    exact = x.double() @ p.terms()[0].t()
    assert_within(got, exact, 8 * U * exact.abs())  # at most 4 pieces: a conversion and an addition each


def test_groups_that_are_zero_or_not_finite(isa: int) -> None:
    p = coded("int8/group8", 66, 40, seed=11)
    x = normal(5, 40, seed=12)
    x[1], x[2, 0], x[3, 39], x[4, 8:16] = 0.0, math.inf, math.nan, 0.0
    got = grouped(p, ops.linear_dynamic, x, 8, isa=isa)
    assert got[[2, 3]].isnan().all()
    assert_equal(got[1], p.bias)
    rest = x[[0, 4]]
    check(p, rest, 8, isa)
    assert_equal(grouped(p, ops.linear_dynamic, rest, 8, isa=isa), got[[0, 4]])


def test_x_of_any_layout() -> None:
    p = coded("int8/group8", 70, 33, seed=13)
    x = normal(4, 6, 40, seed=14)
    for view in (x[..., :33], x.transpose(0, 1)[..., :33], x[:, ::2, 7:], x[0, 0, :33], x[:0, :, :33]):
        got = grouped(p, ops.linear_dynamic, view, 16)
        assert got.shape == (*view.shape[:-1], 70)
        assert_equal(got, grouped(p, ops.linear_dynamic, view.contiguous(), 16))
        assert grouped(p, reference.linear_dynamic, view, 16).shape == got.shape


def test_a_group_of_all_of_k_is_a_token_up_to_rounding(isa: int) -> None:
    p, x = coded("int8/channel", 70, 96, seed=15), normal(5, 96, seed=16)
    by_token = p.dynamic(ops.linear_dynamic, x, p.bias, torch.float32, isa)
    check(p, x, 96, isa)
    torch.testing.assert_close(grouped(p, ops.linear_dynamic, x, 96, isa=isa), by_token, rtol=1e-5, atol=1e-5)


def test_opcheck_with_the_kernels() -> None:
    p = coded("int8/group8", 70, 33, seed=17)
    for shape in [(3, 33), (2, 0, 33), (33,)]:
        arguments = (torch.randn(shape), *p.packed, p.bias, 70, 33, p.text, torch.float16)
        torch.library.opcheck(ops.linear_dynamic.default, arguments, {"x_group": 8})


@pytest.mark.parametrize("x_group", [6, -4])
def test_groups_of_no_whole_quads_are_refused(x_group: int) -> None:
    p = coded("int8/group8", 70, 33, seed=18)
    with pytest.raises(RuntimeError, match=f"linear_dynamic: x_group is {x_group}; 0, or a multiple of 4, is taken"):
        grouped(p, ops.linear_dynamic, torch.ones(2, 33), x_group)
