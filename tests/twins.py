"""Twins of the numerics, written from the formats' definitions in Python floats and float64.

Slow, and sharing no code with fxquant.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

U = 2.0**-24  # unit roundoff of float32


def fixed_point_error(x: Tensor, weight: Tensor) -> Tensor:
    """How far x rounded to 2**-22 of its row's largest value takes x @ weight^T, at most: float64 [M, N].

    What the CPU kernels of weights alone do to a float x before its products with integers, which are exact: a little
    more than 2**-15 to one of 16 bits.
    """
    part = 2.0**-22 if x.dtype == torch.float32 else 1.004 * 2.0**-15
    return part * x.double().abs().amax(-1, keepdim=True) * weight.double().abs().sum(-1)


def decode_float8(code: int, exponent_bits: int, mantissa_bits: int, *, has_infinity: bool) -> float:
    """Value of one float8 byte by its fields. e4m3fn: (4, 3, has_infinity=False); e5m2: (5, 2, has_infinity=True)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    top = exponent == (1 << exponent_bits) - 1
    if has_infinity and top:
        return sign * math.inf if mantissa == 0 else math.nan
    if not has_infinity and top and mantissa == (1 << mantissa_bits) - 1:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def nearest_float8(value: float, table: list[float]) -> int:
    """Byte of the finite table entry nearest to value; of two equally near the even byte; saturating. Sign kept."""
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    magnitude = abs(value)
    finite = [code for code in range(128) if math.isfinite(table[code])]
    return sign | min(finite, key=lambda code: (abs(table[code] - magnitude), code % 2))


def encode_granule(values: list[float], qmax: int) -> tuple[list[int], float]:
    """Symmetric codes and scale of one granule of float32 values; the contract's text, in numpy float32 scalars."""
    amax = np.float32(max((abs(v) for v in values), default=0.0))
    if any(not math.isfinite(v) for v in values):
        return [0] * len(values), math.nan
    if amax == 0 or float(amax) < 2.0 ** (math.ceil(math.log2(qmax)) - 126):
        return [0] * len(values), 0.0
    factor = np.float32(qmax) / amax
    codes = [int(np.clip(np.rint(np.float32(v) * factor), -qmax, qmax)) for v in values]
    return codes, float(amax / np.float32(qmax))


def int8_linear_float64(
    codes: Tensor, x_scale: Tensor, weight_codes: Tensor, scale: Tensor, bias: Tensor | None, out_unit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(y, bound) in float64: the product of codes with its scales, and how far a float32 evaluation may be from it.

    `out_unit` is the unit roundoff of the output dtype if that is not float32.
    """
    total = codes.double() @ weight_codes.double().t()
    product = total * x_scale.double() * scale.double().reshape(-1)
    y = product if bias is None else product + bias.double()
    return y, 3 * U * product.abs() + U * y.abs() + out_unit * y.abs()


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """|got - want| <= bound elementwise, with an account of where it is not."""
    error = (got.double() - want).abs()
    bad = ~(error <= bound)
    if bad.any():
        first = [index.tolist() for index in bad.nonzero()[:5]]
        shown = ", ".join(f"{i}: got {got[tuple(i)].item()!r} want {want[tuple(i)].item()!r}" for i in first)
        worst = (error / bound).nan_to_num(nan=math.inf).max().item()
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} beyond the bound, worst by {worst:.3g} times it; {shown}"
        )


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal dtype, shape and bytes, NaN included."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
