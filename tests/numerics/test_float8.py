from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import numerics
from fxquant.algorithms import absmax
from fxquant.numerics import decode
from fxquant.spec import FLOAT8_E4M3FN, FLOAT8_E5M2, NumberFormat, TensorSpec
from tests.twins import assert_same_bits, decode_float8, nearest_float8

FIELDS = {
    "float8_e4m3fn": {"exponent_bits": 4, "mantissa_bits": 3, "has_infinity": False},
    "float8_e5m2": {"exponent_bits": 5, "mantissa_bits": 2, "has_infinity": True},
}
TABLES = {name: [decode_float8(code, **fields) for code in range(256)] for name, fields in FIELDS.items()}
BOTH = pytest.mark.parametrize("number", [FLOAT8_E4M3FN, FLOAT8_E5M2], ids=str)


def spec_of(number: NumberFormat, granularity: str = "tensor") -> TensorSpec:
    return TensorSpec.parse(f"{number}/{granularity}")


def encode(values: list[float] | Tensor, number: NumberFormat) -> list[int]:
    """Bytes of values under scale 1."""
    spec = spec_of(number)
    found = numerics.encode(torch.as_tensor(values), numerics.symmetric_scales(torch.tensor([spec.qmax]), spec), spec)
    assert found.scale.tolist() == [1.0]
    return found.codes.view(torch.uint8).tolist()


@BOTH
def test_all_256_codes_decode_as_the_format_defines(number: NumberFormat) -> None:
    codes = torch.arange(256).to(torch.uint8).view(number.storage)
    got = decode(codes, torch.tensor([1.0]), None, spec_of(number), torch.float32)
    assert_same_bits(got.isnan(), torch.tensor([math.isnan(v) for v in TABLES[number.name]]))
    want = torch.tensor(TABLES[number.name])
    assert_same_bits(got.nan_to_num(nan=0.0, posinf=math.inf), want.nan_to_num(nan=0.0, posinf=math.inf))
    assert max(v for v in TABLES[number.name] if math.isfinite(v)) == number.qmax


@BOTH
def test_all_finite_codes_encode_to_themselves(number: NumberFormat) -> None:
    finite = [code for code in range(256) if math.isfinite(TABLES[number.name][code])]
    assert encode([TABLES[number.name][code] for code in finite], number) == finite


@BOTH
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_between_all_neighbours_go_to_the_even_code(number: NumberFormat, sign: float) -> None:
    table = TABLES[number.name]
    top = max(code for code in range(128) if math.isfinite(table[code]))
    middles = sign * torch.tensor([(table[code] + table[code + 1]) / 2 for code in range(top)])
    flag = 0x80 if sign < 0 else 0
    assert encode(middles, number) == [flag | (code + code % 2) for code in range(top)]
    # One float32 towards zero or away from it there is no tie.
    assert encode(torch.nextafter(middles, torch.zeros(top)), number) == [flag | code for code in range(top)]
    away = torch.nextafter(middles, sign * torch.full((top,), math.inf))
    assert encode(away, number) == [flag | (code + 1) for code in range(top)]


@settings(deadline=None)
@given(st.floats(-1e5, 1e5, width=32), st.sampled_from([FLOAT8_E4M3FN, FLOAT8_E5M2]))
def test_encodes_to_the_nearest_and_saturates(value: float, number: NumberFormat) -> None:
    assert encode([value], number) == [nearest_float8(value, TABLES[number.name])]


@BOTH
def test_values_beyond_the_given_range_saturate(number: NumberFormat) -> None:
    largest = TABLES[number.name].index(number.qmax)
    values = [number.qmax * 1.0625, 1e38, math.inf, -1e38, -math.inf]
    assert encode(values, number) == [largest] * 3 + [0x80 | largest] * 2


@BOTH
def test_the_absolute_range_lands_on_the_largest_code(number: NumberFormat) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 33) * torch.logspace(-30, 30, 8)[:, None]
    found = absmax(x, spec_of(number, "channel"))
    assert found.scale.shape == (8, 1)
    assert torch.equal(found.codes.float().abs().amax(1), torch.full((8,), number.qmax))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_half_a_step(number: NumberFormat, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 257).to(dtype)
    found = absmax(x, spec_of(number, "channel"))
    got = decode(*found[:3], spec_of(number, "channel"), torch.float64)
    fields = FIELDS[number.name]
    subnormal_step = math.ldexp(1.0, 2 - 2 ** (fields["exponent_bits"] - 1) - fields["mantissa_bits"])
    # Half a unit in the last place, or of the subnormals; 1e-6 covers the four float32 roundings around it.
    relative = x.double().abs() * 2.0 ** -(fields["mantissa_bits"] + 1)
    bound = torch.maximum(relative, found.scale.double() * subnormal_step / 2) * (1 + 2.0**-18)
    assert ((got - x.double()).abs() <= bound).all()


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_granule_that_is_not_finite_is_nan(number: NumberFormat, bad: float) -> None:
    found = absmax(torch.tensor([[1.0, bad], [0.0, 0.0], [2.0, -2.0]]), spec_of(number, "token"))
    top = TABLES[number.name].index(number.qmax)
    assert found.codes.view(torch.uint8).tolist() == [[0, 0], [0, 0], [top, top | 0x80]]
    assert found.scale.isnan().flatten().tolist() == [True, False, False]
    assert found.scale[1] == 0
