"""Floats of 3 to 8 bits, fpB_eXmY: sign, exponent, mantissa; subnormals; all codes finite (OCP MX v1.0, 5.3).

The value of sign s, exponent field e and mantissa m is (-1)^s * 2^(e - bias) * (1 + m / 2^Y), and for e = 0
(-1)^s * 2^(1 - bias) * m / 2^Y. bias = 2^(X-1) - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.spec import NumberFormat

FLOAT32_BIAS = 127
FLOAT32_MANTISSA_BITS = 23


def code_values(number: NumberFormat, device: torch.device | str | None = None) -> Tensor:
    """The value of each bit pattern, float32 [2^bits]; an integer's patterns are two's complement."""
    patterns = torch.arange(2**number.bits, device=device)
    if number.kind == "int":
        half = 2 ** (number.bits - 1)
        return ((patterns + half) % (2 * half) - half).float()
    if not number.is_small_float:
        return patterns.to(torch.uint8).view(number.storage).float()
    sign = 1 - 2 * (patterns >> (number.bits - 1))
    exponent = (patterns >> number.mantissa_bits) & (2**number.exponent_bits - 1)
    mantissa = patterns & (2**number.mantissa_bits - 1)
    implied = (exponent > 0).long() << number.mantissa_bits
    power = exponent.clamp(min=1) - number.bias - number.mantissa_bits
    return sign.float() * torch.ldexp((implied + mantissa).float(), power)


def small_float_bits(values: Tensor, number: NumberFormat) -> Tensor:
    """uint8 bit patterns of float32 values within [qmin, qmax], rounded to nearest, ties to the even pattern.

    A negative value that rounds to zero, and -0, has the pattern of -0.
    """
    shift = FLOAT32_MANTISSA_BITS - number.mantissa_bits
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # With the small format's bias in place of float32's, the pattern is float32's without its last mantissa bits; a
    # carry out of the mantissa goes into the exponent, as it should.
    normal = magnitude - ((FLOAT32_BIAS - number.bias) << FLOAT32_MANTISSA_BITS)
    even = (normal >> shift) & 1
    normal = normal.add_(even).add_((1 << (shift - 1)) - 1).bitwise_right_shift_(shift)
    # Added to a float32 whose unit in the last place is the step of subnormals, a value is rounded to that step.
    smallest_normal = math.ldexp(1.0, 1 - number.bias)
    big = math.ldexp(smallest_normal, shift)
    subnormal = values.abs().add_(big).sub_(big).mul_(1.0 / math.ldexp(smallest_normal, -number.mantissa_bits))
    code = torch.where(values.abs() < smallest_normal, subnormal.to(torch.int32), normal)
    sign = (bits >> (32 - number.bits)) & (1 << (number.bits - 1))
    return code.bitwise_or_(sign).to(torch.uint8)
