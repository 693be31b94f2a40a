"""Twins of the small floats and of the block scales, from the formats' definitions, in Python floats (float64).

Slow, and sharing no code with fxquant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FloatFormat:
    """Fields of a float format. `special`: what its codes beside numbers are.

    none   all codes are finite (OCP MX FP6, FP4).
    fn     the largest magnitude is NaN (OCP FP8 e4m3).
    ieee   the largest exponent holds infinity and NaN (OCP FP8 e5m2).
    fnuz   the pattern of -0 is NaN, and the bias is larger by 1.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    special: str = "none"

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    def value(self, code: int) -> float:
        """What the bit pattern means."""
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        exponent, mantissa = divmod(magnitude, 1 << self.mantissa_bits)
        top = (1 << self.exponent_bits) - 1
        if self.special == "fnuz" and sign < 0 and magnitude == 0:
            return math.nan
        if self.special == "fn" and magnitude == (1 << (self.bits - 1)) - 1:
            return math.nan
        if self.special == "ieee" and exponent == top:
            return math.nan if mantissa else sign * math.inf
        bias = (1 << (self.exponent_bits - 1)) - (0 if self.special == "fnuz" else 1)
        if exponent == 0:
            return sign * math.ldexp(mantissa, 1 - bias - self.mantissa_bits)
        return sign * math.ldexp((1 << self.mantissa_bits) + mantissa, exponent - bias - self.mantissa_bits)

    def table(self) -> list[float]:
        return [self.value(code) for code in range(1 << self.bits)]

    def finite(self) -> list[int]:
        return [code for code in range(1 << self.bits) if math.isfinite(self.value(code))]

    def top(self) -> int:
        """The code of the largest finite value."""
        return max(code for code in self.finite() if code < 1 << (self.bits - 1))

    def nearest(self, value: float) -> int:
        """The code nearest to value; of two equally near the even one; saturating; the sign is kept, that of 0 too."""
        positive = range(self.top() + 1)
        code = min(positive, key=lambda c: (abs(self.value(c) - abs(value)), c % 2))
        negative = math.copysign(1.0, value) < 0 and not (self.special == "fnuz" and code == 0)
        return code | (1 << (self.bits - 1) if negative else 0)


SMALL_FLOATS = [
    FloatFormat(f"fp{bits}_e{x}m{bits - 1 - x}", x, bits - 1 - x)
    for bits in range(3, 9)
    for x in range(1, bits)
    if (bits, x) not in ((8, 4), (8, 5))  # these two names are the float8 types
]
FLOAT8 = [
    FloatFormat("float8_e4m3fn", 4, 3, "fn"),
    FloatFormat("float8_e5m2", 5, 2, "ieee"),
    FloatFormat("float8_e4m3fnuz", 4, 3, "fnuz"),
    FloatFormat("float8_e5m2fnuz", 5, 2, "fnuz"),
]
FLOATS = [*SMALL_FLOATS, *FLOAT8]
BY_NAME = {f.name: f for f in FLOATS}


def mx_exponent(amax: float, largest: float) -> int:
    """The exponent of an e8m0 scale: that of amax less that of the largest element, within its range."""
    if amax == 0.0:
        return -127
    # frexp gives a fraction in [1/2, 1): its exponents are larger by 1, both of them.
    return min(max(math.frexp(amax)[1] - math.frexp(largest)[1], -127), 127)


def bfloat16(value: np.float32) -> np.float32:
    """To nearest even, to the largest finite number at most."""
    largest = np.uint32(0x7F7F0000).view(np.float32)
    bits = int(np.float32(min(value, largest)).view(np.uint32))
    return np.uint32((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
