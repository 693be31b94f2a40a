"""Trying ranges: a fixed list of them around the plain one; for each granule the one that leaves the least error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.algorithms.grids import grid_of
from fxquant.algorithms.ranges import Range
from fxquant.algorithms.rows import Rows
from fxquant.numerics import MOST_STEPS, symmetric_scales
from fxquant.spec import TensorSpec

# Factors of the plain range: so many, in equal ratios, the plain range first.
FACTORS = 24
# Three-level codes of a long row of normal values want 0.3 of its range.
SMALLEST_FACTOR = 0.2
# An e8m0 exponent is rounded down, so that the plain range may saturate, and a larger one be better.
EXPONENTS = (0, 1, -1, -2)
# Bit patterns of positive e4m3 numbers are in their order, 8 an octave: the plain block scale, and those around it.
PATTERNS = (0, *range(1, 9), *range(-1, -13, -1))
LARGEST_E4M3 = 0x7E
# A sum of 65536 numbers in float32, in 16 lanes, is off by at most 2**12 roundings of 2**-24: less of a gain is none.
GAIN = 1 - 2.0**-12


def candidates(plain: Range, size: int, spec: TensorSpec, tensor_scale: Tensor | None, stride: int = 1) -> Range:
    """Ranges [candidates, g, 1] a side of granules of `size` values, the plain one first.

    stride: leave so many of the factors out, but for each stride-th.
    """
    low, high = plain
    column = high.new_tensor
    if spec.scale in ("e8m0", "e4m3"):
        if tensor_scale is not None:
            amax = _e4m3_neighbours(high, spec, tensor_scale)
        else:
            amax = high * torch.exp2(column(EXPONENTS).view(-1, 1, 1))
            amax.clamp_(max=torch.finfo(torch.float32).max)
        amax[0] = high
        return Range(amax, amax)
    if spec.scale == "stepped" and tensor_scale is not None:
        amax = column(range(MOST_STEPS + 1)).view(-1, 1, 1) * (tensor_scale * spec.qmax)
        amax[0] = high
        return Range(amax, amax)
    factors = column(factors_of(size, spec)[::stride]).view(-1, 1, 1)
    if spec.scheme == "shift":
        cut = (high - low) * ((1 - factors) / 2)
        return Range(low + cut, high - cut)
    return Range(low * factors, high * factors)


def factors_of(size: int, spec: TensorSpec) -> list[float]:
    """Factors of the plain range that may be worth it for granules of `size` values, from 1 down.

    To cut the largest value A by (1 - factor) * A costs more than all `size` roundings do, by step**2 / 12 each, if the
    factor is below 1 - sqrt(size / 12) * step / A.
    """
    number = spec.format
    steps = (spec.qmax - spec.qmin) / 2 if number.kind == "int" else 2 ** (number.mantissa_bits + 1) - 1
    smallest = max(SMALLEST_FACTOR, 1 - math.sqrt(size / 12) / steps)
    return [smallest ** (index / (FACTORS - 1)) for index in range(FACTORS)]


def least_squares(rows: Rows, ranges: Range, spec: TensorSpec, tensor_scale: Tensor | None) -> Range:
    """Of ranges [candidates, g, 1] a side the one for each granule, [g, 1] a side, that leaves the least squared error.

    Where nothing is finite it is the first: the plain range, which says what becomes of such values.
    """
    grids = grid_of(ranges, spec, tensor_scale)
    errors = torch.zeros(ranges.high.shape, dtype=torch.float64, device=ranges.high.device)
    for here, values in rows.parts():
        norms = [
            torch.linalg.vector_norm(grid.residual_steps(values), dim=1, keepdim=True) for grid in grids.of(here).each()
        ]
        errors[:, here].add_(torch.stack(norms).double().square_())
    errors.mul_(grids.scale.double().square_())
    errors[0] *= GAIN
    # A range too small to divide by has no steps to be off by.
    errors[1:].masked_fill_(grids.factor[1:] == 0, torch.inf)
    best = errors.nan_to_num_(nan=torch.inf, posinf=torch.inf).argmin(0, keepdim=True)
    return Range(ranges.low.gather(0, best)[0], ranges.high.gather(0, best)[0])


def _e4m3_neighbours(amax: Tensor, spec: TensorSpec, tensor_scale: Tensor) -> Tensor:
    """Absolute ranges whose e4m3 scales are the plain one and those around it."""
    offsets = torch.tensor(PATTERNS, device=amax.device).view(-1, 1, 1)
    pattern = symmetric_scales(amax, spec, tensor_scale).scale.view(torch.uint8).int()
    around = (pattern + offsets).clamp_(1, LARGEST_E4M3).to(torch.uint8).view(torch.float8_e4m3fn)
    return around.to(torch.float32) * spec.qmax * tensor_scale
