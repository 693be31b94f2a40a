"""Scales: from the range of a granule to the number that is stored, and the factor that values are multiplied by."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.numerics.codes import no_tensor_scale, no_zero_point
from fxquant.numerics.held import held_exponents, held_scale, scale_values
from fxquant.spec import FLOAT8_E4M3FN, TensorSpec

# The smallest e4m3 above 0: a block that is not zero keeps a scale.
SMALLEST_E4M3 = 2.0**-9
# The steps of the largest scale of a row: an int4 code, times that, is an int8 code.
MOST_STEPS = 16
_CUT_BITS = 1 << 20  # of a float32's 23 below the leading one, 20
FLOAT32_EXPONENTS = 254  # e8m0 numbers its exponents as float32 does; 255 is NaN, here and there


class Scales(NamedTuple):
    """What the granules of one tensor have; the fields of `Codes`, and in float32, in the same shape, two more.

    factor  what a value is multiplied by; 0 for a granule without usable range.
    offset  affine: the zero point; shift: the value of code 0, which is subtracted first; None if symmetric.
    """

    scale: Tensor
    zero_point: Tensor
    tensor_scale: Tensor
    factor: Tensor
    offset: Tensor | None = None


def smallest_range(span: float) -> float:
    """The range below which a granule counts as zero: span / range would overflow, or range / span be subnormal.

    2**(ceil(log2(span)) - 126): 2**-119 for the 127 steps of int8.
    """
    return math.ldexp(1.0, math.ceil(math.log2(span)) - 126)


def scale_and_factor(
    extent: Tensor, span: float, dtype: torch.dtype = torch.float32, headroom: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(scale, factor) of granules whose range is `extent`, for codes that span `span` steps; scale in `dtype`.

    float32: scale = extent / span and factor = span / extent, each rounded once. bfloat16: the scale is rounded to
    nearest even, to the largest finite number at most, and factor = 1 / scale. A range too small to divide by, also
    after a division by `headroom`: both 0. A range that is not finite: scale NaN, so that nothing plausible is ever
    computed from it, and factor 0.
    """
    finite = extent.isfinite()
    usable = finite & (extent >= smallest_range(span * headroom))
    zero = torch.zeros_like(extent)
    scale = torch.where(usable, extent / span, zero)
    if dtype == torch.float32:
        # A reciprocal of the range times span would round twice, and differ from the kernels at ties.
        factor = torch.full_like(extent, span) / extent
    else:
        scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype)
        factor = scale.float().reciprocal()
    return torch.where(finite, scale, math.nan), torch.where(usable, factor, zero)


def symmetric_scales(amax: Tensor, spec: TensorSpec, tensor_scale: Tensor | None = None) -> Scales:
    """Scales of granules whose absolute range is `amax`, float32 in the shape of the scales.

    tensor_scale: under which scale of the whole tensor, or in which steps, [..., 1] of each row, if the spec has one or
    the other; the default is that of the largest range.
    """
    match spec.scale:
        case "e8m0":
            scale, factor = _power_of_two(amax, spec)
        case "e4m3":
            return _under_tensor_scale(amax, spec, tensor_scale)
        case "stepped":
            scale, factor = _in_steps(amax, spec, tensor_scale)
        case _:
            scale, factor = scale_and_factor(amax, spec.qmax, spec.scale_dtype)
    return Scales(scale, no_zero_point(scale), no_tensor_scale(scale), factor)


def row_steps(amax: Tensor, spec: TensorSpec) -> Tensor:
    """The step, float32 [..., 1], of rows of granules with those absolute ranges [..., granules]; 0 of an empty range.

    The smallest number of four significant bits in MOST_STEPS of which the largest range is covered: no multiple needs
    more bits than a bfloat16 has. Of a lone granule it is the scale in bfloat16.
    """
    if amax.shape[-1] == 1:
        return torch.where(amax.isfinite(), scale_and_factor(amax, spec.qmax, torch.bfloat16)[0].float(), 0.0)
    finite = torch.where(amax.isfinite(), amax, 0.0)
    top = finite.amax(-1, keepdim=True) if amax.numel() else finite.new_zeros((*amax.shape[:-1], 1))
    exact = top / spec.qmax * _covered(spec) / MOST_STEPS
    usable = top >= smallest_range(spec.qmax) * 2 * MOST_STEPS
    # Three bits stay below the leading one; what is carried goes into the exponent.
    up = (exact.view(torch.int32) + (_CUT_BITS - 1)) & -_CUT_BITS
    return torch.where(usable, up.view(torch.float32), 0.0)


def affine_scales(low: Tensor, high: Tensor, spec: TensorSpec) -> Scales:
    """Scales and integer zero points of granules from `low` <= 0 to `high` >= 0, float32 in the shape of the scales."""
    scale, factor = scale_and_factor(high - low, spec.qmax, spec.scale_dtype)
    zero = torch.where(factor != 0, -low * factor, 0.0).round_().clamp_(0, spec.qmax)
    return Scales(scale, zero.to(torch.uint8), no_tensor_scale(scale), factor, zero)


def shift_scales(low: Tensor, high: Tensor, spec: TensorSpec) -> Scales:
    """Scales and shifts of granules from `low`, the value of code 0, to `high`; float32 in the shape of the scales.

    A shift that the scale's dtype cannot hold saturates. That of a granule which is not finite is 0.
    """
    extent = high - low
    scale, factor = scale_and_factor(extent, spec.qmax, spec.scale_dtype)
    limit = torch.finfo(spec.scale_dtype).max
    shift = torch.where(extent.isfinite(), low, 0.0).clamp_(-limit, limit).to(spec.scale_dtype)
    return Scales(scale, shift, no_tensor_scale(scale), factor, shift.float())


def _covered(spec: TensorSpec) -> float:
    """How much of a range a scale has to cover so that no value is off by more than half a step."""
    return spec.qmax / (spec.qmax + 0.5)


def _in_steps(amax: Tensor, spec: TensorSpec, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two-level scales: whole multiples of a row's step. Given steps: the nearest multiple; else the one that covers.

    Progressive group quantization, Lin et al., QServe, 2024 (arXiv:2405.04532), section 4.1, with the second level
    in whole numbers that a code can be multiplied by.
    """
    finite = amax.isfinite()
    if step is None:
        step = row_steps(amax, spec)
        wanted = (amax / spec.qmax * _covered(spec) / step).ceil()
    else:
        wanted = (amax / spec.qmax / step).round()
    usable = finite & (step > 0) & (amax > 0)
    scale = torch.where(usable, wanted.clamp(1, MOST_STEPS) * step, 0.0)
    factor = torch.where(usable, scale.reciprocal(), 0.0)
    return torch.where(finite, scale, math.nan).to(torch.bfloat16), factor


def _power_of_two(amax: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """OCP MX v1.0, 6.3: the exponent is floor(log2(amax)) less that of the format's largest value."""
    # The exponent field is floor(log2(amax)) + 127; for subnormals, zero included, it is 0, and so is the result.
    exponent = (amax.view(torch.int32) >> 23) - spec.format.largest_exponent
    finite = amax.isfinite()
    exponent = torch.where(finite, exponent.clamp_(0, FLOAT32_EXPONENTS), FLOAT32_EXPONENTS + 1)
    scale = held_exponents(exponent.to(torch.uint8))
    factor = torch.ldexp(torch.ones_like(amax), FLOAT32_EXPONENTS // 2 - exponent)
    return scale, torch.where(finite & (amax > 0), factor, 0.0)


def _under_tensor_scale(amax: Tensor, spec: TensorSpec, tensor_scale: Tensor | None) -> Scales:
    """NVFP4: float8 block scales under one scale for the tensor, by which the largest of them is 448."""
    if tensor_scale is None:
        whole = (amax.amax() if amax.numel() else amax.new_zeros(())).reshape([1] * amax.dim())
        # The smallest block scale times the tensor's must still have a finite reciprocal.
        tensor_scale, _ = scale_and_factor(whole, spec.qmax * FLOAT8_E4M3FN.qmax, headroom=1 / SMALLEST_E4M3)
    usable = (tensor_scale > 0) & (amax > 0)
    blocks = (amax / spec.qmax / tensor_scale).clamp_(SMALLEST_E4M3, FLOAT8_E4M3FN.qmax)
    scale = held_scale(torch.where(usable, blocks, 0.0), torch.float8_e4m3fn)
    values = scale_values(scale, torch.float8_e4m3fn)
    factor = torch.where(usable, (values * tensor_scale).reciprocal(), 0.0)
    return Scales(scale, no_zero_point(scale), tensor_scale, factor)
