"""Ranges of granules, and the scales that they give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fxquant.numerics import Codes, Scales, absolute_range, affine_scales, encode, shift_scales, symmetric_scales
from fxquant.numerics import value_range as smallest_and_largest
from fxquant.spec import TensorSpec


class Range(NamedTuple):
    """What the first and the last code of each granule stand for, float32; if symmetric both are the largest one."""

    low: Tensor
    high: Tensor


def plain_range(x: Tensor, spec: TensorSpec) -> Range:
    """The range that nothing in x goes beyond, in the shape of the scales: of absmax if symmetric, else of minmax."""
    if spec.scheme == "symmetric":
        amax = absolute_range(x, spec.granularity)
        return Range(amax, amax)
    return Range(*smallest_and_largest(x, spec.granularity, hold_zero=spec.scheme == "affine"))


def scales_of(ranges: Range, spec: TensorSpec, tensor_scale: Tensor | None = None) -> Scales:
    """The scales that ranges give; under that tensor scale, if the spec has one, instead of one of their own."""
    match spec.scheme:
        case "symmetric":
            return symmetric_scales(ranges.high, spec, tensor_scale)
        case "affine":
            return affine_scales(ranges.low, ranges.high, spec)
        case "shift":
            return shift_scales(ranges.low, ranges.high, spec)


def codes_of(x: Tensor, ranges: Range, spec: TensorSpec, tensor_scale: Tensor | None = None) -> Codes:
    """x quantized with those ranges, in the shape of the scales; values beyond them saturate."""
    return encode(x, scales_of(ranges, spec, tensor_scale), spec)
