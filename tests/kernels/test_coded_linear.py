"""Linears of float x over weights of any format, on every instruction set that this machine has."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.ops import reference
from tests.kernels.coded_problems import FEW_SPECS, SPECS, coded, opchecks
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


def check(text: str, shape: tuple[int, int, int], dtype: torch.dtype, isa: int) -> None:
    """What Coded's bounds say of the sum, u for the bias, u_out for the output."""
    m, n, k = shape
    p = coded(text, n, k, seed=n + k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    for op, (product, bound), which in (
        (ops.linear_weight_only, p.kernel_bound(x, isa), (isa,)),
        (reference.linear_weight_only, p.bound(x), ()),
    ):
        want = product + p.bias.double()
        bound = SECOND_ORDER * (bound + (U + U_OUT[dtype]) * want.abs()) + SMALLEST_HALF_STEP[dtype]
        got = p.weight_only(op, x, p.bias, dtype, *which)
        assert got.dtype == dtype
        assert_within(got, want, bound)


@pytest.mark.parametrize("text", SPECS)
def test_every_format_stays_in_the_derived_bound(isa: int, text: str) -> None:
    for k in (161, 264):  # rows alone; a full panel and a part of one
        check(text, (7, 70, k), torch.float32, isa)


@pytest.mark.parametrize("text", FEW_SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_stays_in_the_derived_bound(
    isa: int, text: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(text, shape, dtype, isa)


@pytest.mark.parametrize("text", FEW_SPECS)
@pytest.mark.parametrize("k", [1, 31, 160, 1000])
def test_every_depth(isa: int, text: str, k: int) -> None:
    check(text, (3, 65, k), torch.float32, isa)


@pytest.mark.parametrize("text", ["int4/group8/affine", "int2/channel", "int6/group20/shift", "fp4_e2m1/group16/e4m3"])
@pytest.mark.parametrize("rows", [1, 7, 97])
def test_exact_where_float32_holds_every_sum(isa: int, text: str, rows: int) -> None:
    """Small integers times powers of two: no rounding, in whatever order."""
    p = coded(text, 70, 300, seed=11, exact=True)
    x = torch.randint(-15, 16, (rows, 300), generator=torch.Generator().manual_seed(12)).float()
    value, shift = p.terms()
    want = x.double() @ (value + shift).t() + p.bias.double()
    assert_equal(p.weight_only(ops.linear_weight_only, x, p.bias, torch.float32, isa), want.float())


@pytest.mark.parametrize("bias_dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_bias_of_any_float_type(isa: int, dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    p = coded("int4/group20", 70, 40, seed=13, exact=True)
    bias = None if bias_dtype is None else p.bias.to(bias_dtype)  # a small integer: every dtype holds it
    x = torch.randint(-3, 4, (5, 40), generator=torch.Generator().manual_seed(14)).to(torch.bfloat16)
    want = x.double() @ p.terms()[0].t() + (0 if bias is None else p.bias.double())
    assert_equal(p.weight_only(ops.linear_weight_only, x, bias, dtype, isa), want.float().to(dtype))


@pytest.mark.parametrize("text", [*FEW_SPECS, "int4/group16/bf16", "int4/group32/affine", "int4/channel"])
def test_heights_give_the_same_rows(isa: int, text: str) -> None:
    """A row's bits do not depend on how many rows stand beside it: the order of its sum is always that of k."""
    p = coded(text, 70, 333, seed=15)
    x = torch.randn(259, 333, generator=torch.Generator().manual_seed(16))
    whole = p.weight_only(ops.linear_weight_only, x, p.bias, torch.float32, isa)
    for rows in (1, 2, 6, 7, 97, 256):
        assert_equal(p.weight_only(ops.linear_weight_only, x[:rows], p.bias, torch.float32, isa), whole[:rows])


@pytest.mark.parametrize("shape", [(1, 6000, 700), (5, 6000, 700), (600, 900, 300)], ids=str)
def test_threads_do_not_change_a_bit(threads: None, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    p = coded("int4/group128/affine/bf16", n, k, seed=17)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(18))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = p.weight_only(ops.linear_weight_only, x, p.bias, torch.float32)
        results.append((y, ops.pack_panels(p.codes, p.text)))
    for other in results[1:]:
        assert_equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


def test_x_of_any_layout() -> None:
    p = coded("int6/group8", 70, 33, seed=19)
    x = torch.randn(4, 6, 40, generator=torch.Generator().manual_seed(20))
    for view in (x[..., :33], x.transpose(0, 1)[..., :33], x[1, :, 3:36], x[:, ::2, 7:], x[0, 0, :33], x[:0, :, :33]):
        got = p.weight_only(ops.linear_weight_only, view, None, torch.float32)
        assert got.shape == (*view.shape[:-1], 70)
        assert_equal(got, p.weight_only(ops.linear_weight_only, view.contiguous(), None, torch.float32))


@pytest.mark.parametrize("text", ["int4/group8", "int4/group8/affine", "fp6_e3m2/group8/bf16", "nvfp4"])
def test_scales_of_nan_and_zero_stay_in_their_columns(isa: int, text: str) -> None:
    p = coded(text, 66, 40, seed=21)
    size = p.spec.granularity.size
    p.scale[3, 1], p.scale[65, -1], p.scale[7] = math.nan, math.nan, 0.0
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(22))
    got = p.weight_only(ops.linear_weight_only, x, None, torch.float32, isa)
    assert size < 40
    assert got[:, [3, 65]].isnan().all()
    assert torch.equal(got[:, 7].abs(), torch.zeros(3))
    assert int(got.isnan().sum()) == 6


def test_non_finite_x_stays_in_its_row(isa: int) -> None:
    p = coded("int4/group8/affine", 70, 33, seed=23)
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(24))
    x[2, 32], x[5, 0] = math.nan, math.inf
    got = p.weight_only(ops.linear_weight_only, x, None, torch.float32, isa)
    want = p.weight_only(reference.linear_weight_only, x, None, torch.float32)
    assert got[2].isnan().all()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert got[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 9])
def test_non_finite_x_stays_in_its_row_of_codes(isa: int, rows: int) -> None:
    p = coded("int4/group16/affine", 70, 33, seed=29)
    assert p.takes_codes
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(30))
    clean = p.weight_only(ops.linear_weight_only, x, None, torch.float32, isa)
    x[0, 32], x[5, 0] = math.nan, math.inf
    got = p.weight_only(ops.linear_weight_only, x[:rows], None, torch.float32, isa)
    hit = [row for row in (0, 5) if row < rows]
    assert not got[hit].isfinite().any()
    others = [row for row in range(rows) if row not in hit]
    assert_equal(got[others], clean[others])


def test_packed_weight_at_an_odd_address(isa: int) -> None:
    """A weight mapped from a file stands wherever the file puts it."""
    p = coded("int6/group8/affine/bf16", 70, 33, seed=25)
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(26))
    want = p.weight_only(ops.linear_weight_only, x, None, torch.float32, isa)
    parts = [t for t in p.packed if t is not None]
    moved = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in parts]
    assert moved[0].data_ptr() % 2 == 1
    got = ops.linear_weight_only(x, *moved, None, None, 70, 33, p.text, torch.float32, isa)
    assert_equal(got, want)


@pytest.mark.parametrize("text", FEW_SPECS)
def test_opcheck_with_the_kernels(text: str) -> None:
    p = coded(text, 70, 33, seed=27)
    for shape in [(3, 33), (2, 0, 33), (33,)]:
        arguments = (torch.randn(shape), *p.packed, p.tensor_scale, p.bias, 70, 33, text, torch.float16)
        torch.library.opcheck(ops.linear_weight_only.default, arguments, test_utils=opchecks(arguments))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"isa": 9}, "isa is 9; known are 0"),
        ({"in_features": 32}, "x has 33 features, in_features is 32"),
        ({"tensor_scale": None}, "scales of e4m3 need a tensor_scale"),
        ({"bias": torch.ones(3)}, "bias has 3 values for 70 output features"),
        ({"dtype": torch.float64}, "dtype is Double; float32, bfloat16 and float16 are taken"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, object], words: str) -> None:
    p = coded("fp4_e2m1/group16/e4m3", 70, 33, seed=28)
    named = {"tensor_scale": p.tensor_scale, "bias": None, "out_features": 70, "in_features": 33, "spec": p.text}
    named |= {"dtype": torch.float32, "isa": 0}
    with pytest.raises(RuntimeError, match=words):
        ops.linear_weight_only(torch.ones(2, 33), *p.packed, *(named | change).values())
