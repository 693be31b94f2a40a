"""Rounding by a scale that is given, not found in the values: what a calibration recorded.

One float32 scale for a whole tensor. Values beyond the largest code become the largest; what is not finite must not
look like a number, and becomes NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.numerics.codes import decode, no_tensor_scale, no_zero_point
from fxquant.numerics.encoding import encode
from fxquant.numerics.scales import Scales
from fxquant.spec import TensorSpec

# The reciprocal of a smaller float32 overflows, or is close to that.
SMALLEST_SCALE = 2.0**-126


def given_scales(scale: Tensor) -> Scales:
    """Scale and factor 1 / scale, rounded once, of a tensor whose scale is `scale`: float32, one number, any shape.

    Below 2**-126 the factor is 0: all codes are 0. A scale that is negative or not finite is NaN, with a factor of 0.
    """
    kept = torch.where((scale >= 0) & scale.isfinite(), scale, math.nan)
    factor = torch.where(kept >= SMALLEST_SCALE, kept.reciprocal(), 0.0)
    return Scales(kept, no_zero_point(scale), no_tensor_scale(scale), factor)


def rounded_by(x: Tensor, scale: Tensor, spec: TensorSpec) -> Tensor:
    """x on the spec's grid under that scale, in x's dtype; NaN where x is not finite. Contiguous."""
    scales = given_scales(scale)
    value = decode(encode(x, scales, spec).codes, scales.scale, None, spec, x.dtype)
    return value.masked_fill_(~x.isfinite(), math.nan)


def inside_of(x: Tensor, scale: Tensor, spec: TensorSpec) -> Tensor:
    """Bool, in the shape of x: whether rounding alone, with nothing cut off, leaves a value within the codes."""
    return (x.float() * given_scales(scale).factor).abs() < _reach(spec)


def _reach(spec: TensorSpec) -> float:
    """The largest code and half of a step beyond it."""
    number = spec.format
    step = 1.0 if number.kind == "int" else math.ldexp(1.0, number.largest_exponent - number.mantissa_bits)
    return number.qmax + step / 2
