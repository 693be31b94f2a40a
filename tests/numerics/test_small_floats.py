"""Every code of every float format, every midpoint between two, and what lies beyond."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import numerics
from fxquant.numerics import code_values, decode
from fxquant.spec import TensorSpec, number_format
from tests.numerics.twin import BY_NAME, FLOAT8, FLOATS, FloatFormat
from tests.twins import assert_same_bits

ALL = pytest.mark.parametrize("number", FLOATS, ids=str)
PUBLIC = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


def spec_of(number: FloatFormat) -> TensorSpec:
    return TensorSpec.parse(f"{number}/tensor")


def patterns(number: FloatFormat) -> Tensor:
    """All codes, in the code dtype."""
    return torch.arange(2**number.bits).to(torch.uint8).view(spec_of(number).code_dtype)


def encode(values: Tensor, number: FloatFormat) -> list[int]:
    """Bit patterns of values under scale 1."""
    spec = spec_of(number)
    found = numerics.encode(values, numerics.symmetric_scales(torch.tensor([spec.qmax]), spec), spec)
    assert found.scale.tolist() == [1.0]
    assert found.codes.dtype == spec.code_dtype
    return found.codes.view(torch.uint8).tolist()


def assert_same_numbers(got: Tensor, want: Tensor) -> None:
    """Equal bits; NaN equals NaN."""
    assert torch.equal(got.isnan(), want.isnan())
    assert_same_bits(got[~got.isnan()], want[~want.isnan()])


@ALL
def test_every_code_decodes_as_the_format_defines(number: FloatFormat) -> None:
    want = torch.tensor(number.table(), dtype=torch.float64)
    assert torch.equal(want.float().double().nan_to_num(), want.nan_to_num())  # float32 holds them exactly
    got = decode(patterns(number), torch.tensor([1.0]), None, spec_of(number), torch.float32)
    assert_same_numbers(got, want.float())
    assert_same_numbers(code_values(number_format(number.name)), want.float())


@ALL
def test_the_range_is_that_of_the_finite_codes(number: FloatFormat) -> None:
    found = number_format(number.name)
    values = [number.value(code) for code in number.finite()]
    assert (found.qmin, found.qmax) == (min(values), max(values))
    assert 2.0**found.largest_exponent <= found.qmax < 2.0 ** (found.largest_exponent + 1)
    assert (found.bits, found.exponent_bits, found.mantissa_bits) == (
        number.bits,
        number.exponent_bits,
        number.mantissa_bits,
    )


@ALL
def test_every_finite_code_encodes_to_itself(number: FloatFormat) -> None:
    finite = number.finite()
    assert encode(torch.tensor([number.value(code) for code in finite]), number) == finite


@ALL
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearest(number: FloatFormat, sign: float) -> None:
    top = number.top()
    # Two neighbours' mean needs one bit more than they do: exact in float32.
    middles = sign * torch.tensor([(number.value(code) + number.value(code + 1)) / 2 for code in range(top)])
    flag = 1 << (number.bits - 1) if sign < 0 else 0

    def pattern(code: int) -> int:
        return 0 if code == 0 and number.special == "fnuz" else flag | code

    assert encode(middles, number) == [pattern(code + code % 2) for code in range(top)]
    towards_zero = torch.nextafter(middles, torch.zeros(top))
    assert encode(towards_zero, number) == [pattern(code) for code in range(top)]
    away = torch.nextafter(middles, sign * torch.full((top,), math.inf))
    assert encode(away, number) == [pattern(code + 1) for code in range(top)]


@ALL
def test_beyond_the_largest_is_the_largest(number: FloatFormat) -> None:
    largest, flag = number.value(number.top()), 1 << (number.bits - 1)
    beyond = [math.nextafter(largest, math.inf) * (1 + 1e-6), largest * 1.5, 3e38, math.inf]
    assert encode(torch.tensor(beyond), number) == [number.top()] * 4
    assert encode(-torch.tensor(beyond), number) == [number.top() | flag] * 4


@ALL
def test_zero_keeps_its_sign_where_the_format_has_one(number: FloatFormat) -> None:
    minus = 0 if number.special == "fnuz" else 1 << (number.bits - 1)
    tiny = math.ldexp(1.0, -149)
    assert encode(torch.tensor([0.0, -0.0, tiny, -tiny]), number) == [0, minus, 0, minus]


@settings(deadline=None, max_examples=300)
@given(st.floats(-1.0, 1.0, width=32), st.sampled_from(FLOATS))
def test_any_value_goes_to_the_nearest_code(fraction: float, number: FloatFormat) -> None:
    value = float(np.float32(fraction * number.value(number.top())))
    assert encode(torch.tensor([value]), number) == [number.nearest(value)]


# ---- public references


@pytest.mark.parametrize(("name", "public"), PUBLIC.items(), ids=PUBLIC)
def test_codes_are_those_of_ml_dtypes(name: str, public: type) -> None:
    number = BY_NAME[name]
    raw = np.arange(2**number.bits, dtype=np.uint8)
    assert_same_numbers(code_values(number_format(name)), torch.from_numpy(raw.view(public).astype(np.float32)))
    torch.manual_seed(0)
    largest = number.value(number.top())
    finite = torch.tensor(sorted(number.value(code) for code in number.finite()))
    middles = (finite[1:] + finite[:-1]) / 2
    around = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-math.inf, math.inf)]
    exponents = torch.randint(-20, 1, (20000,))
    values = torch.cat([finite, middles, *around, torch.ldexp(torch.rand(20000) * 2 - 1, exponents) * largest])
    values = torch.cat([values, -values])
    assert encode(values, number) == values.numpy().astype(public).view(np.uint8).tolist()


@pytest.mark.parametrize("number", FLOAT8, ids=str)
def test_float8_codes_are_those_of_the_cast_of_torch(number: FloatFormat) -> None:
    torch.manual_seed(0)
    largest = number.value(number.top())
    values = torch.cat([torch.randn(50000) * largest / 8, torch.randn(1000) * 1e-6]).clamp(-largest, largest)
    cast = values.to(spec_of(number).code_dtype)
    assert encode(values, number) == cast.view(torch.uint8).tolist()
    one = torch.tensor([1.0])
    assert_same_numbers(decode(cast, one, None, spec_of(number), torch.float32), cast.float())


@pytest.mark.parametrize("bits", range(2, 9))
def test_values_of_integer_patterns_are_twos_complement(bits: int) -> None:
    want = [pattern - (2**bits if pattern >= 2 ** (bits - 1) else 0) for pattern in range(2**bits)]
    assert code_values(number_format(f"int{bits}")).tolist() == want


@pytest.mark.parametrize("name", ["int8", "fp6_e3m2", "float8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_decoding_computes_in_float32_and_rounds_once(name: str, dtype: torch.dtype) -> None:
    spec = TensorSpec.parse(f"{name}/token")
    values = code_values(spec.format)
    codes = torch.arange(256 if spec.format.bits == 8 else 64).to(torch.uint8).view(spec.code_dtype)[None]
    got = decode(codes, torch.tensor([[0.1]]), None, spec, dtype)
    assert_same_numbers(got, (values * torch.tensor(0.1))[None].to(dtype))
