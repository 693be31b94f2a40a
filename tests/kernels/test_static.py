"""The CPU kernels of activations with a recorded scale against their references, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.conv_problems import SHAPES, ConvProblem, Shape, layouts
from tests.kernels.cpu_helpers import (
    DTYPES,
    SMALLEST_HALF_STEP,
    U_OUT,
    U,
    assert_equal,
    assert_within,
    problem,
    product64,
)
from tests.kernels.cpu_helpers import SHAPES as LINEARS

ops = torch.ops.fxquant
# A format of each kind: subnormals or none, -0 or none, no mantissa.
FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "fp6_e2m3", "fp4_e2m1", "fp3_e1m1", "fp8_e7m0")
SCALES = (0.02, 1.0, 0.0, 2.0**-126, 2.0**-127, 2.0**127, float("nan"), float("inf"), -1.0)


pytestmark = pytest.mark.usefixtures("kernels")


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_bits(dtype: torch.dtype) -> Tensor:
    """Every value of 16 bits, or float32 of random bits: NaN, infinity and subnormals among them."""
    if dtype != torch.float32:
        return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    raw = torch.randint(-(2**31), 2**31, (300, 97), generator=torch.Generator().manual_seed(2))
    return raw.to(torch.int32).view(torch.float32)


def ties(dtype: torch.dtype) -> Tensor:
    """Halves of codes, up to beyond the range, for scale 1."""
    return (torch.arange(-300, 301) / 2).to(dtype).repeat(3, 1)


def special(k: int) -> Tensor:
    rows = normal(8, k, seed=4)
    rows[1] = 0.0
    rows[2, k // 2] = torch.nan
    rows[3, k - 1] = torch.inf
    rows[4, 0] = -torch.inf
    rows[5] = torch.finfo(torch.float32).max
    rows[6] = -0.0
    return rows


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Signs of zeros too; NaN of any bits where NaN is wanted."""
    assert_equal(got, want)
    assert got.stride() == want.stride()
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())


# ---- rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", FORMATS)
def test_rounding_is_bit_equal_to_the_reference(number: str, dtype: torch.dtype) -> None:
    spec = f"{number}/tensor"
    for x in (any_bits(dtype), ties(dtype), normal(3, 5, 67).to(dtype)):
        for scale in SCALES:
            one = torch.tensor(scale)
            assert_same_bits(ops.fake_quantize_static(x, one, spec), reference.fake_quantize_static(x, one, spec))


@pytest.mark.parametrize("spec", ["int8/tensor", "float8_e4m3fn/tensor"])
def test_rounding_of_any_layout(spec: str) -> None:
    x, scale = normal(4, 6, 5, 40), torch.tensor([0.02])
    views = (x, x.to(memory_format=torch.channels_last), x.transpose(1, 2), x[:, ::2, 1:4, 3:36], x[0, 0, 0], x[:, :0])
    for view in (*views, x[:1].expand(3, 6, 5, 40), x[..., 0]):
        assert_same_bits(ops.fake_quantize_static(view, scale, spec), reference.fake_quantize_static(view, scale, spec))


# ---- linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_the_linear_is_bit_equal_and_within_the_derived_bound(
    isa: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, k = shape
    p, x, scale = problem(n, k, seed=5, exact=False), normal(m, k, seed=6).to(dtype), torch.tensor(0.02)
    got = ops.int8_linear_static(x, scale, p.packed, p.scale, p.bias, k, isa)
    assert_equal(got, reference.int8_linear_static(x, scale, p.packed, p.scale, p.bias, k))
    factor = torch.tensor(1.0) / scale
    codes = (x.float() * factor).round().clamp(-127, 127).to(torch.int8)
    product = product64(codes, p.codes) * scale.double() * p.scale.double().t()
    want = product + p.bias.double()
    bound = 3 * U * product.abs() + (U + U_OUT[dtype]) * want.abs() * 1.01 + SMALLEST_HALF_STEP[dtype]
    assert_within(got, want, bound)


@pytest.mark.parametrize("scale", SCALES)
def test_special_rows_and_scales_through_the_linear(isa: int, scale: float) -> None:
    p, x, one = problem(70, 33, seed=15, exact=False), special(33), torch.tensor(scale)
    got = ops.int8_linear_static(x, one, p.packed, p.scale, p.bias, 33, isa)
    assert_equal(got, reference.int8_linear_static(x, one, p.packed, p.scale, p.bias, 33))
    assert got[[2, 3, 4]].isnan().all()
    if scale == 0.02:
        assert_equal(got[1], p.bias)


def test_ties_and_all_bits_through_the_linear(isa: int) -> None:
    """An identity as weight shows the codes."""
    for dtype in DTYPES:
        for x in (ties(dtype), any_bits(dtype)):
            k = x.shape[1]
            codes, scale = torch.eye(k).to(torch.int8), torch.ones(k)
            arguments = (torch.tensor(1.0), ops.int8_pack(codes), scale, None, k)
            assert_equal(ops.int8_linear_static(x, *arguments, isa), reference.int8_linear_static(x, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_spacing(dtype: torch.dtype) -> None:
    p, x = problem(70, 33, seed=11, exact=False), normal(8, 33, seed=12).to(dtype)
    tail = (torch.tensor([0.02]), p.packed, p.scale, p.bias, 33)
    want = ops.int8_linear_static(x, *tail)
    for view in (x.repeat(1, 2)[:, :33], x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        assert_equal(ops.int8_linear_static(view, *tail), want)
    assert_equal(ops.int8_linear_static(x.view(2, 4, 33).transpose(0, 1), *tail), want.view(2, 4, 70).transpose(0, 1))
    assert_equal(ops.int8_linear_static(x[3], *tail), want[3])


# ---- convolution


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_convolution_is_bit_equal_to_the_reference(isa: int, shape: Shape, dtype: torch.dtype) -> None:
    p, scale = ConvProblem(shape, dtype), torch.tensor(0.02)
    for bias in (None, p.bias):
        arguments = p.int8(bias)
        for x in layouts(p.x):
            got = ops.int8_conv_static(x, scale, *arguments, isa)
            assert_same_bits(got, reference.int8_conv_static(x, scale, *arguments))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5]], ids=str)
def test_special_samples_and_scales_through_the_convolution(isa: int, shape: Shape, scale: float) -> None:
    p, one = ConvProblem(shape), torch.tensor(scale)
    x = p.x[:1].repeat(4, 1, 1, 1)
    x[0, -1, 2, 3], x[1, 0, 0, 0], x[2] = torch.nan, -torch.inf, 3e38
    for layout in layouts(x):
        got = ops.int8_conv_static(layout, one, *p.int8(p.bias), isa)
        assert_equal(got, reference.int8_conv_static(layout, one, *p.int8(p.bias)))
        assert got[:2].isnan().all()


# ---- all three


def calls() -> dict[str, tuple[Any, ...]]:
    p, c, scale = problem(300, 170, seed=17, exact=False), ConvProblem(SHAPES[8]), torch.tensor(0.02)
    x = normal(500, 170, seed=18)
    return {
        "int8_linear_static": (x, scale, p.packed, p.scale, p.bias, 170),
        "int8_conv_static": (c.x.repeat(9, 1, 1, 1), scale, *c.int8(c.bias)),
        "fake_quantize_static": (x, scale, "int8/tensor"),
    }


@pytest.mark.parametrize("name", calls())
def test_threads_do_not_change_a_bit(name: str) -> None:
    arguments, before = calls()[name], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = getattr(ops, name)(*arguments)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same_bits(getattr(ops, name)(*arguments), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", calls())
def test_opcheck_with_the_kernels(name: str) -> None:
    x, *rest = calls()[name]
    for changed in (x[:2].half(), x[:2].clone().requires_grad_(), x[:0]):
        torch.library.opcheck(getattr(ops, name).default, (changed, *rest))


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1, dtype=torch.float64)], ids=str)
def test_a_scale_that_is_not_one_float_is_named(name: str, scale: Tensor) -> None:
    x, _, *rest = calls()[name]
    with pytest.raises(
        RuntimeError, match=f"fxquant::{name}: the scale of x has . values of .*; one of Float is needed"
    ):
        getattr(ops, name)(x, scale, *rest)


@pytest.mark.parametrize("spec", ["int8/token", "int4/tensor", "int8/group32"])
def test_other_specs_are_refused(spec: str) -> None:
    with pytest.raises(RuntimeError, match="fxquant::fake_quantize_static: spec"):
        ops.fake_quantize_static(normal(3, 4), torch.ones(1), spec)
