from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import numerics
from fxquant.algorithms import absmax, minmax, quantize
from fxquant.numerics import (
    Codes,
    absolute_range,
    decode,
    smallest_range,
    value_range,
)
from fxquant.spec import Granularity, TensorSpec
from tests.twins import U, assert_same_bits, assert_within, encode_granule

INT8_TENSOR = TensorSpec.parse("int8/tensor")
INT8_TOKEN = TensorSpec.parse("int8/token")
INT8_CHANNEL = TensorSpec.parse("int8/channel")
INF, NAN = math.inf, math.nan


def decoded(found: Codes, spec: TensorSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    return decode(*found[:3], spec, dtype)


# ---- codes, exhaustively


@pytest.mark.parametrize("exponent", [-125, -20, 0, 20, 120])
@pytest.mark.parametrize(("text", "largest"), [("int8/tensor", 127), ("int4/tensor", 7)])
def test_every_symmetric_code_survives_decode_and_encode(text: str, largest: int, exponent: int) -> None:
    spec = TensorSpec.parse(text)
    codes = torch.arange(-largest, largest + 1, dtype=torch.int8)
    step = torch.tensor([math.ldexp(1.0, exponent)])
    values = decode(codes, step, None, spec, torch.float32)
    assert values.tolist() == [math.ldexp(code, exponent) for code in range(-largest, largest + 1)]
    again = absmax(values, spec)
    assert_same_bits(again.codes, codes)
    assert_same_bits(again.scale, step)
    assert again.zero_point.shape == (0,)


@pytest.mark.parametrize(("text", "largest"), [("int8/tensor/affine", 255), ("int4/tensor/affine", 15)])
def test_every_affine_code_survives_with_every_zero_point(text: str, largest: int) -> None:
    spec = TensorSpec.parse(text)
    codes = torch.arange(largest + 1, dtype=torch.uint8)
    for zero in range(largest + 1):
        values = decode(codes, torch.tensor([0.5]), torch.tensor([zero], dtype=torch.uint8), spec, torch.float32)
        assert values.tolist() == [(code - zero) / 2 for code in range(largest + 1)]
        again = minmax(values, spec)
        assert_same_bits(again.codes, codes)
        assert again.scale.tolist() == [0.5]
        assert again.zero_point.tolist() == [zero]


def test_minus_128_decodes_although_it_is_never_made() -> None:
    assert decode(torch.tensor([-128], dtype=torch.int8), torch.tensor([2.0]), None, INT8_TENSOR, torch.float32) == -256


@pytest.mark.parametrize("largest", [7, 127])
def test_ties_go_to_the_even_code(largest: int) -> None:
    spec = TensorSpec.parse("int8/tensor" if largest == 127 else "int4/tensor")
    halves = torch.arange(-largest, largest).float() + 0.5
    scales = numerics.symmetric_scales(torch.tensor([float(largest)]), spec)  # scale and factor are 1
    # Half way between n and n + 1 the even one of the two: -0.5 -> 0, 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.
    want = [n if n % 2 == 0 else n + 1 for n in range(-largest, largest)]
    assert numerics.encode(halves, scales, spec).codes.tolist() == want
    # The next float32 on either side is no tie.
    below, above = torch.nextafter(halves, halves - 1), torch.nextafter(halves, halves + 1)
    assert numerics.encode(below, scales, spec).codes.tolist() == list(range(-largest, largest))
    assert numerics.encode(above, scales, spec).codes.tolist() == list(range(-largest + 1, largest + 1))


def test_affine_ties_are_decided_before_the_zero_point_is_added() -> None:
    spec = TensorSpec.parse("int4/tensor/affine")
    x = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5])
    found = numerics.encode(x, numerics.affine_scales(torch.tensor([-5.0]), torch.tensor([10.0]), spec), spec)
    assert found.zero_point.tolist() == [5]
    assert found.codes.tolist() == [5 + 0, 5 + 2, 5 + 0, 5 - 2, 5 + 2]


def test_values_beyond_the_given_range_saturate() -> None:
    x = torch.tensor([-1e38, -300.0, 300.0, 1e38])
    scales = numerics.symmetric_scales(torch.tensor([127.0]), INT8_TENSOR)
    assert numerics.encode(x, scales, INT8_TENSOR).codes.tolist() == [-127, -127, 127, 127]
    affine = TensorSpec.parse("int4/tensor/affine")
    scales = numerics.affine_scales(torch.tensor([-7.0]), torch.tensor([8.0]), affine)
    assert numerics.encode(x, scales, affine).codes.tolist() == [0, 0, 15, 15]


# ---- against the twin


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=12))
def test_codes_and_scale_are_the_twins(values: list[float]) -> None:
    for text, largest in (("int8/token", 127), ("int4/channel", 7)):
        spec = TensorSpec.parse(text)
        found = absmax(torch.tensor([values]), spec)
        codes, scale = encode_granule(values, largest)
        assert found.codes.tolist() == [codes]
        np.testing.assert_array_equal(found.scale.numpy(), np.array([[scale]], dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["int8/token", "int8/channel", "int8/tensor", "int4/group7", "int8/group32"])
def test_error_is_at_most_half_a_step(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = TensorSpec.parse(text)
    x = (torch.randn(17, 65) * torch.logspace(-3, 3, 17)[:, None]).to(dtype)
    found = absmax(x, spec)
    step = decode(torch.ones_like(found.codes), found.scale, None, spec, torch.float64)
    # code = rint(x * factor (1 + u)); factor * scale = 1 with two roundings more; the decoded value is rounded once.
    assert_within(decoded(found, spec), x.double(), step * (0.5 + 4 * U * spec.qmax))


def test_affine_error_is_at_most_a_step() -> None:
    torch.manual_seed(0)
    spec = TensorSpec.parse("int4/group32/affine")
    w = torch.randn(33, 100) + 0.3
    found = minmax(w, spec)
    step = decode(torch.ones_like(found.codes), found.scale, torch.zeros_like(found.zero_point), spec, torch.float64)
    # Half a step for the value; at the ends of the range half a step more, where the rounded zero point pushes it out.
    assert_within(decoded(found, spec), w.double(), step * (1.0 + 8 * U * 15))
    inner = found.codes.gt(0) & found.codes.lt(15)
    assert_within(decoded(found, spec)[inner], w.double()[inner], step[inner] * (0.5 + 8 * U * 15))


def test_affine_decodes_zero_exactly() -> None:
    torch.manual_seed(1)
    w = torch.randn(64, 32) + torch.linspace(-4, 4, 64)[:, None]
    w[:, 5] = 0.0
    spec = TensorSpec.parse("int4/channel/affine")
    assert torch.equal(decoded(minmax(w, spec), spec)[:, 5], torch.zeros(64))


# ---- ranges at their ends


@pytest.mark.parametrize(("span", "exponent"), [(127, -119), (7, -123), (255, -118), (15, -122), (448, -117)])
def test_smallest_range_keeps_scale_normal_and_factor_finite(span: int, exponent: int) -> None:
    smallest = smallest_range(span)
    assert smallest == 2.0**exponent
    assert np.float32(smallest) / np.float32(span) >= np.finfo(np.float32).tiny
    assert np.isfinite(np.float32(span) / np.float32(smallest))


def test_just_below_the_smallest_range_counts_as_zero() -> None:
    smallest = torch.tensor(2.0**-119)
    x = torch.stack([smallest, torch.nextafter(smallest, torch.tensor(0.0)), torch.tensor(2.0**-149)])[:, None]
    found = absmax(x, INT8_TOKEN)
    assert found.codes.tolist() == [[127], [0], [0]]
    assert found.scale.tolist() == [[(smallest / 127).item()], [0.0], [0.0]]


def test_zero_rows_have_scale_zero_and_leave_others_alone() -> None:
    x = torch.tensor([[0.0, -0.0], [1.0, -127.0]])
    found = absmax(x, INT8_TOKEN)
    assert found.codes.tolist() == [[0, 0], [1, -127]]
    assert found.scale.tolist() == [[0.0], [1.0]]
    assert decoded(found, INT8_TOKEN).tolist() == [[0.0, 0.0], [1.0, -127.0]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("text", ["int8/token", "int8/channel/affine", "int4/group2/affine"])
def test_a_granule_that_is_not_finite_is_nan_and_leaves_others_alone(bad: float, text: str) -> None:
    spec = TensorSpec.parse(text)
    found = quantize(torch.tensor([[3.0, bad], [1.0, 2.0]]), spec)
    assert found.codes[0].tolist() == [0, 0]
    assert found.scale[0].isnan().all()
    assert decoded(found, spec)[0].isnan().all()
    alone = quantize(torch.tensor([[1.0, 2.0]]), spec)
    assert torch.equal(found.codes[1:], alone.codes)
    assert torch.equal(found.scale[1:], alone.scale)


def test_an_affine_range_that_overflows_counts_as_not_finite() -> None:
    spec = TensorSpec.parse("int8/tensor/affine")
    found = minmax(torch.tensor([-3e38, 3e38]), spec)
    assert found.scale.isnan().all()
    assert found.codes.tolist() == [0, 0]


def test_largest_finite_values() -> None:
    top = torch.finfo(torch.float32).max
    found = absmax(torch.tensor([[top, -top, top / 2]]), INT8_TOKEN)
    assert found.codes.tolist() == [[127, -127, 64]]  # 63.5 is a tie: the even code
    assert found.scale.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 2.0**-24),  # scale 2**-24 / 127 is below float16
        (torch.float16, 2.0**-14),  # factor 127 * 2**14 is beyond float16
        (torch.float16, 65504.0),
        (torch.bfloat16, 2.0**-119),  # scale is below bfloat16's normal range
        (torch.bfloat16, 3.3895e38),
    ],
)
def test_half_precision_is_widened_before_its_scale_is_made(dtype: torch.dtype, value: float) -> None:
    x = torch.tensor([[value, -value]], dtype=dtype)
    found = absmax(x, INT8_TOKEN)
    assert found.codes.tolist() == [[127, -127]]
    assert found.scale.dtype == torch.float32
    assert_same_bits(found.scale, x.float()[:, :1] / 127)


# ---- granules


@pytest.mark.parametrize(
    ("text", "shape", "want"),
    [
        ("tensor", (3, 4, 5), [1, 1, 1]),
        ("channel", (3, 4), [3, 1]),
        ("channel", (3, 4, 5, 6), [3, 1, 1, 1]),
        ("token", (2, 3, 4), [2, 3, 1]),
        ("token", (4,), [1]),
        ("group4", (3, 8), [3, 2]),
        ("group4", (3, 9), [3, 3]),
        ("group128", (3, 5), [3, 1]),
    ],
)
def test_scale_shapes(text: str, shape: tuple[int, ...], want: list[int]) -> None:
    granularity = Granularity.parse(text)
    assert granularity.scale_shape(shape) == want
    assert list(absmax(torch.ones(shape), TensorSpec.parse(f"int8/{text}")).scale.shape) == want


@pytest.mark.parametrize("text", ["int8/tensor", "int8/channel", "int8/token", "int8/group4", "int4/group4/affine"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (1, 1)])
def test_empty_and_tiny_tensors(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    found = quantize(torch.full(shape, 2.0), spec)
    assert found.codes.shape == shape
    assert list(found.scale.shape) == spec.granularity.scale_shape(shape)
    assert torch.equal(decoded(found, spec), torch.full(shape, 2.0))


@pytest.mark.parametrize("text", ["int8/group5", "int4/group5", "int4/group5/affine", "int8/group64"])
@pytest.mark.parametrize("columns", [1, 4, 5, 6, 17])
def test_groups_are_independent_and_the_last_may_be_shorter(text: str, columns: int) -> None:
    torch.manual_seed(2)
    spec = TensorSpec.parse(text)
    size = spec.granularity.size
    w = torch.randn(3, columns) - 0.7
    found = quantize(w, spec)
    alone = TensorSpec(spec.format, Granularity("channel"), spec.scheme)
    for index, start in enumerate(range(0, columns, size)):
        part = quantize(w[:, start : start + size], alone)
        assert torch.equal(found.codes[:, start : start + size], part.codes)
        assert torch.equal(found.scale[:, index : index + 1], part.scale)
        if spec.scheme == "affine":
            assert torch.equal(found.zero_point[:, index : index + 1], part.zero_point)


def test_channel_of_a_convolution_is_axis_0() -> None:
    torch.manual_seed(3)
    w = torch.randn(5, 3, 2, 2)
    flat = absmax(w.flatten(1), INT8_CHANNEL)
    found = absmax(w, INT8_CHANNEL)
    assert torch.equal(found.codes.flatten(1), flat.codes)
    assert torch.equal(found.scale.flatten(1), flat.scale)


def test_ranges_hold_zero() -> None:
    low, high = value_range(torch.tensor([[1.0, 2.0], [-3.0, -1.0]]), Granularity.parse("channel"))
    assert low.tolist() == [[0.0], [-3.0]]
    assert high.tolist() == [[2.0], [0.0]]
    assert absolute_range(torch.tensor([[1.0, -2.0]]), Granularity.parse("token")).tolist() == [[2.0]]


def test_codes_are_contiguous_whatever_the_strides() -> None:
    x = torch.randn(6, 5).t()
    for text in ("int8/token", "int4/group2/affine", "fp8/channel"):
        found = quantize(x, TensorSpec.parse(text))
        assert found.codes.is_contiguous()
        assert torch.equal(found.codes.float(), quantize(x.contiguous(), TensorSpec.parse(text)).codes.float())


def test_the_input_is_not_written_to() -> None:
    x = torch.randn(4, 4)
    before = x.clone()
    for text in ("int8/token", "int8/tensor", "int4/group2/affine", "fp8/channel"):
        quantize(x, TensorSpec.parse(text))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decode_computes_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8)[None]
    scale = torch.tensor([[0.1]])
    got = decode(codes, scale, None, INT8_TOKEN, dtype)
    assert_same_bits(got, (codes.float() * scale).to(dtype))
