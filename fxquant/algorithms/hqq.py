"""hqq: half-quadratic quantization, after H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning
Models", 2023 (mobiusml.github.io/hqq_blog).

It looks for the grid that leaves the least sum of |error| ** p, p = 0.7, which a few large errors hardly move, by
splitting: an auxiliary error e is the shrunk residual of the values w, and the grid is fitted to w - e. In turn:

    r = w - grid(w);   e = sign(r) * max(|r| - |r| ** (p - 1) / beta, 0);   fit the grid to w - e by least squares

The paper starts from the plain range and fits the offset alone. Here the start is the best of some shrunk ranges, and
the scale is fitted too (by itself where there is no offset; a zero point moves by whole steps). The paper's beta, 10,
counts in weights, so that the result depends on how large they are: here r is measured against the granule's mean
error under the plain range, and beta is 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.algorithms.candidates import GAIN, candidates, least_squares
from fxquant.algorithms.grids import Grid, grid_of
from fxquant.algorithms.ranges import Range
from fxquant.algorithms.rows import Rows
from fxquant.spec import TensorSpec

NORM = 0.7
# beta is 1 at first: an error as large as the mean one is all shrunk away. It grows as in the paper, an iteration.
GROWTH = 1.01
ITERATIONS = 20
START = 3  # of the factors that mse tries, every third


class _Means(NamedTuple):
    """Means over each granule [g, 1]: of |r|, and of products of d = r - e and the steps c; what no fit needs is 0."""

    error: Tensor
    d: Tensor
    c: Tensor
    cc: Tensor
    cd: Tensor


def hqq_range(rows: Rows, plain: Range, spec: TensorSpec, tensor_scale: Tensor | None) -> Range:
    """The range of each granule that half-quadratic splitting finds; `plain` and the result are [g, 1] a side.

    The iterate with the least mean absolute error is kept, the plain range among them.
    """
    found = plain
    unit = _mean_error(rows, grid_of(plain, spec, tensor_scale))
    best, threshold = unit * GAIN, (2 - NORM) * torch.log2(unit)
    starts = candidates(plain, rows.values.shape[1], spec, tensor_scale, START)
    tried = least_squares(rows, starts, spec, tensor_scale)
    grid = grid_of(tried, spec, tensor_scale)
    for _ in range(ITERATIONS):
        means = _means(rows, grid, threshold)
        found, best = _better(tried, means.error, found, best)
        tried, threshold = _fitted(grid, means), threshold - math.log2(GROWTH)
        grid = grid_of(tried, spec, tensor_scale)
    return _better(tried, _mean_error(rows, grid), found, best)[0]


def _better(tried: Range, error: Tensor, found: Range, best: Tensor) -> tuple[Range, Tensor]:
    better = error < best  # never true of NaN
    low, high = torch.where(better, tried.low, found.low), torch.where(better, tried.high, found.high)
    return Range(low, high), torch.where(better, error, best)


def _mean_error(rows: Rows, grid: Grid) -> Tensor:
    total = torch.zeros_like(grid.scale)
    for here, values in rows.parts():
        part = grid.of(here)
        total[here].add_(part.values(part.steps(values)).sub_(values).abs_().sum(1, keepdim=True))
    return total / rows.values.shape[1]


def _means(rows: Rows, grid: Grid, threshold: Tensor) -> _Means:
    """One pass over the values; the shrinkage takes |r| ** (NORM - 1) * 2 ** threshold away."""
    sums = _Means(*(torch.zeros_like(threshold) for _ in _Means._fields))
    for here, values in rows.parts():
        part = grid.of(here)
        c = part.steps(values)
        r = torch.sub(values, part.values(c))
        size = r.abs()
        sums.error[here].add_(size.sum(1, keepdim=True))
        taken = _shrinkage(size, threshold[here])
        # r - e: all of a small residual; of a large one what the shrinkage takes away.
        d = torch.minimum(r, taken, out=r)
        d = torch.maximum(d, taken.neg_(), out=d)
        if grid.offset is not None:
            sums.d[here].add_(d.sum(1, keepdim=True))
        if grid.spec.scheme == "shift":
            sums.c[here].add_(c.sum(1, keepdim=True))
        sums.cd[here].add_(d.mul_(c).sum(1, keepdim=True))
        sums.cc[here].add_(c.square_().sum(1, keepdim=True))
    return _Means(*(total / rows.values.shape[1] for total in sums))


def _shrinkage(size: Tensor, threshold: Tensor) -> Tensor:
    """size ** (NORM - 1) * 2 ** threshold, within 2 %: a new tensor. The logarithm is taken piecewise linear.

    A power costs ten times as much as all else here. The bits of a float32 are 2**23 * (127 + log2), if the mantissa is
    read as the part behind the point; that is 0.086 off at most, and 0.3 of it in the result.
    """
    bits = size.view(torch.int32).to(torch.float32)
    return bits.mul_((NORM - 1) * 2.0**-23).add_(threshold - 127 * (NORM - 1)).exp2_()


def _fitted(grid: Grid, means: _Means) -> Range:
    """The range whose grid is nearest to w - e in least squares, for the codes that w has now."""
    spec = grid.spec
    if grid.offset is None:
        high = (grid.scale + means.cd / means.cc) * spec.qmax
        return Range(high, high)
    if spec.scheme == "affine":
        scale = grid.scale + means.cd / means.cc
        zero = (grid.offset - means.d / scale).round_().clamp_(0, spec.qmax)
        return Range(-zero * scale, (spec.qmax - zero) * scale)
    slope = (means.cd - means.c * means.d) / (means.cc - means.c.square())
    low = grid.offset + means.d - slope * means.c
    return Range(low, low + (grid.scale + slope) * spec.qmax)
