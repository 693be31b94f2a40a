"""Linears of x quantized per token over packed integers: exact sums in each granule, float32 over granules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.coded_problems import DYNAMIC_SPECS, Coded, coded
from tests.kernels.cpu_helpers import (
    DTYPES,
    SECOND_ORDER,
    SHAPES,
    SMALLEST_HALF_STEP,
    U_OUT,
    U,
    assert_equal,
    assert_within,
)

ops = torch.ops.fxquant


pytestmark = pytest.mark.usefixtures("kernels")


def granule_products(p: Coded, codes: Tensor) -> Tensor:
    """scale * sum of code products of each granule, [M, N, granules] in float64."""
    k = p.sizes[1]
    value, size = p.terms()[0], min(p.spec.granularity.size or k, k)
    return torch.stack([codes[:, g : g + size].double() @ value[:, g : g + size].t() for g in range(0, k, size)], -1)


def check(p: Coded, m: int, dtype: torch.dtype, isa: int) -> None:
    """Each granule: conversion and scale; then a float32 sum over them and the row's scale: gamma_(G + 3)."""
    x = torch.randn(m, p.sizes[1], generator=torch.Generator().manual_seed(m)).to(dtype)
    codes, x_scale = reference.int8_quantize_per_token(x)
    products = granule_products(p, codes) * x_scale.double()[..., None]
    want = products.sum(-1) + p.bias.double()
    steps = products.shape[-1] + 3
    bound = steps * U / (1 - steps * U) * products.abs().sum(-1) + (U + U_OUT[dtype]) * want.abs()
    bound = SECOND_ORDER * bound + SMALLEST_HALF_STEP[dtype]
    for op, which in ((ops.linear_dynamic, (isa,)), (reference.linear_dynamic, ())):
        got = p.dynamic(op, x, p.bias, dtype, *which)
        assert got.dtype == dtype
        assert_within(got, want, bound)


@pytest.mark.parametrize("text", DYNAMIC_SPECS)
def test_every_spec_stays_in_the_derived_bound(isa: int, text: str) -> None:
    for k in (161, 264):  # rows alone; a full panel and a part of one
        check(coded(text, 70, k, seed=1), 7, torch.float32, isa)


@pytest.mark.parametrize("text", ["int4/group32/bf16", "int8/channel/affine", "int3/group300/affine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_stays_in_the_derived_bound(
    isa: int, text: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, k = shape
    check(coded(text, n, k, seed=2), m, dtype, isa)


@pytest.mark.parametrize("k", [1, 31, 160, 256, 1000])
@pytest.mark.parametrize("group", [4, 28, 128, 256, 260, 4096])
def test_groups_of_any_depth(isa: int, k: int, group: int) -> None:
    check(coded(f"int4/group{group}/affine", 65, k, seed=3), 5, torch.float32, isa)


@pytest.mark.parametrize("text", ["int4/group32/bf16", "int8/channel", "int8/group20/affine", "int2/tensor/affine"])
@pytest.mark.parametrize("rows", [1, 7, 97])
def test_exact_with_power_of_two_scales(isa: int, text: str, rows: int) -> None:
    p = coded(text, 70, 120, seed=4, exact=True)
    x = torch.randint(-127, 128, (rows, 120), generator=torch.Generator().manual_seed(5)).float()
    x[:, -1] = 127.0
    want = (granule_products(p, x) * 2.0**-4).sum(-1) + p.bias.double()
    assert_equal(p.dynamic(ops.linear_dynamic, x * 2.0**-4, p.bias, torch.float32, isa), want.float())


@pytest.mark.parametrize("k", [66_001, 140_001])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("text", ["int8/channel", "int8/channel/affine", "int8/group100000/affine"])
def test_sums_at_the_ends_of_int32(isa: int, text: str, k: int, sign: int) -> None:
    """All codes at their ends; a granule beyond 65536 k is summed up in pieces, each exact."""
    plain = coded(text, 3, k, seed=6, exact=True)
    codes = torch.full_like(plain.codes, 255 if plain.zero_point is not None else 127)
    codes[1] = plain.codes[1]
    zero_point = None if plain.zero_point is None else torch.zeros_like(plain.zero_point)
    p = Coded(plain.spec, codes, plain.scale, zero_point, None, plain.bias)
    x = torch.full((2, k), 127.0 * sign)
    x[1, ::3] = -5
    got = p.dynamic(ops.linear_dynamic, x, None, torch.float32, isa)
    assert_equal(got, p.dynamic(reference.linear_dynamic, x, None, torch.float32))
    exact = x.double() @ p.terms()[0].t()
    assert_within(got, exact, 8 * U * exact.abs())  # at most 4 pieces: a conversion and an addition each


@pytest.mark.parametrize(
    ("text", "k"), [("int4/group32/affine", 333), ("int4/group64/bf16", 712), ("int4/group128/affine", 712)]
)
def test_heights_give_the_same_rows(isa: int, text: str, k: int) -> None:
    p = coded(text, 70, k, seed=7)
    x = torch.randn(530, k, generator=torch.Generator().manual_seed(8))
    whole = p.dynamic(ops.linear_dynamic, x, p.bias, torch.float32, isa)
    for rows in (1, 2, 6, 7, 97, 256, 512):
        assert_equal(p.dynamic(ops.linear_dynamic, x[:rows], p.bias, torch.float32, isa), whole[:rows])


def test_x_of_any_layout() -> None:
    p = coded("int6/group8", 70, 33, seed=9)
    x = torch.randn(4, 6, 40, generator=torch.Generator().manual_seed(10))
    for view in (x[..., :33], x.transpose(0, 1)[..., :33], x[:, ::2, 7:], x[0, 0, :33], x[:0, :, :33]):
        got = p.dynamic(ops.linear_dynamic, view, None, torch.float32)
        assert got.shape == (*view.shape[:-1], 70)
        assert_equal(got, p.dynamic(ops.linear_dynamic, view.contiguous(), None, torch.float32))


def test_rows_and_scales_that_are_zero_or_not_finite(isa: int) -> None:
    p = coded("int4/group8/affine", 66, 40, seed=11)
    p.scale[3, 1], p.scale[65, -1], p.scale[7] = math.nan, math.nan, 0.0
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(12))
    x[1], x[2, 0], x[4, 39] = 0.0, math.inf, math.nan
    got = p.dynamic(ops.linear_dynamic, x, None, torch.float32, isa)
    want = p.dynamic(reference.linear_dynamic, x, None, torch.float32)
    assert torch.equal(got.isnan(), want.isnan())
    assert got[[2, 4]].isnan().all()
    assert got[:, [3, 65]].isnan().all()
    assert torch.equal(got[[0, 1, 3, 5], 7].abs(), torch.zeros(4))
    assert torch.equal(got[1, :3].abs(), torch.zeros(3))


@pytest.mark.parametrize("text", ["int4/group32/bf16", "int8/channel/affine"])
def test_opcheck_with_the_kernels(text: str) -> None:
    p = coded(text, 70, 33, seed=13)
    for shape in [(3, 33), (2, 0, 33), (33,)]:
        arguments = (torch.randn(shape), *p.packed, p.bias, 70, 33, text, torch.float16)
        torch.library.opcheck(ops.linear_dynamic.default, arguments)


@pytest.mark.parametrize("text", ["fp4_e2m1/channel", "int4/group6", "int4/channel/shift"])
def test_other_specs_are_refused_by_name(text: str) -> None:
    p = coded(text, 70, 33, seed=14)
    assert p.spec.granularity.scale_shape((70, 33)) == list(p.scale.shape)
    with pytest.raises(RuntimeError, match=f"'{text}' is not of integers, symmetric or affine, in groups that are"):
        p.dynamic(ops.linear_dynamic, torch.ones(2, 33), None, torch.float32)
