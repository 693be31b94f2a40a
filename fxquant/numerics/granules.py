"""Granules: the sets of values that share one scale; their ranges, and scales spread back over the values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.spec import Granularity


def check_shape(shape: tuple[int, ...] | torch.Size, granularity: Granularity) -> str | None:
    """Why a tensor of that shape can't have that granularity, or None if it can."""
    match granularity.kind:
        case "group" if len(shape) != 2:
            return f"a group needs a weight [N, K], not {len(shape)} dimensions"
        case "channel" | "token" if len(shape) == 0:
            return f"granularity {granularity} needs at least one dimension"
        case _:
            return None


def scale_shape(shape: tuple[int, ...] | torch.Size, granularity: Granularity) -> list[int]:
    """Shape of the scales of a tensor of that shape; works on symbolic sizes."""
    match granularity.kind:
        case "tensor":
            return [1] * len(shape)
        case "channel":
            return [shape[0]] + [1] * (len(shape) - 1)
        case "token":
            return [*shape[:-1], 1]
        case "group":
            return [shape[0], (shape[1] + granularity.size - 1) // granularity.size]


def absolute_range(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest absolute value of each granule, float32, in the shape of the scales; NaN if the granule holds one."""
    low, high = value_range(x, granularity)
    return torch.maximum(low.neg(), high)


def value_range(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each granule, widened to hold 0, float32, in the shape of the scales.

    Holding 0 makes the zeros that pad the last group of a row harmless, and the range of an empty granule 0.
    """
    values = x.float()
    zeros = values.new_zeros(scale_shape(x.shape, granularity))
    if x.numel() == 0:
        return zeros, zeros
    if granularity.kind == "group":
        groups = _pad_columns(values, granularity.size).unflatten(1, (-1, granularity.size))
        low, high = groups.amin(-1), groups.amax(-1)
    else:
        dims = _reduced_dims(x.dim(), granularity)
        low, high = (values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)) if dims else (values, values)
    return torch.minimum(low, zeros), torch.maximum(high, zeros)


def combine(
    op: Callable[[Tensor, Tensor], Tensor], values: Tensor, per_granule: Tensor, granularity: Granularity
) -> Tensor:
    """op(values, per_granule) with what each granule has, in the shape of the scales, against all of its values."""
    if granularity.kind != "group":
        return op(values, per_granule)
    size = granularity.size
    if values.shape[1] % size == 0:
        return op(values.unflatten(1, (-1, size)), per_granule.unsqueeze(-1)).flatten(1)
    spread = per_granule.unsqueeze(-1).expand(-1, -1, size).flatten(1)[:, : values.shape[1]]
    return op(values, spread)


def smallest_range(span: float) -> float:
    """The range below which a granule counts as zero: span / range would overflow, or range / span be subnormal.

    2**(ceil(log2(span)) - 126): 2**-119 for the 127 steps of int8.
    """
    return math.ldexp(1.0, math.ceil(math.log2(span)) - 126)


def scale_and_factor(extent: Tensor, span: float) -> tuple[Tensor, Tensor]:
    """(scale, factor) of granules whose range is `extent`, for codes that span `span` steps; float32.

    scale = extent / span and factor = span / extent, each rounded once in float32. A range too small to divide by:
    both 0. A range that is not finite: scale NaN, so that nothing plausible is ever computed from it, and factor 0.
    """
    finite = extent.isfinite()
    usable = finite & (extent >= smallest_range(span))
    zero = torch.zeros_like(extent)
    # A reciprocal of the range times span would round twice, and differ from the kernels at ties.
    factor = torch.where(usable, torch.full_like(extent, span) / extent, zero)
    scale = torch.where(usable, extent / span, zero)
    return torch.where(finite, scale, torch.full_like(extent, math.nan)), factor


def scaled(x: Tensor, factor: Tensor, granularity: Granularity) -> Tensor:
    """x * factor in float32, a new tensor; 0 throughout a granule whose factor is 0, NaN and infinity included."""
    # Only NaN * 0 and infinity * 0 can be NaN here.
    return combine(torch.mul, x.float(), factor, granularity).nan_to_num_(nan=0.0)


def _reduced_dims(ndim: int, granularity: Granularity) -> list[int]:
    match granularity.kind:
        case "tensor":
            return list(range(ndim))
        case "channel":
            return list(range(1, ndim))
        case _:
            return [ndim - 1]


def _pad_columns(x: Tensor, size: int) -> Tensor:
    missing = -x.shape[1] % size
    return torch.nn.functional.pad(x, (0, missing)) if missing else x  # a pad by nothing copies
