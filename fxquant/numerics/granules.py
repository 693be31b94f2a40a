"""Granules: the sets of values that share one scale; their ranges, and what they have spread back over the values.

Whatever the granularity, a tensor is looked at as a matrix whose rows may be cut anywhere, and what each granule has as
a matrix of as many rows (or one) whose columns stand for `width` neighbours each. So the elementwise work goes through
blocks of rows that stay in cache, and a tensor in half precision is widened a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fxquant.spec import TENSOR, Granularity

# 512 KB of float32: a block and its temporaries stay in the second-level cache.
CPU_BLOCK = 2**17
# Elsewhere every operation costs a launch.
DEVICE_BLOCK = 2**24


def absolute_range(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest absolute value of each granule, float32, in the shape of the scales; NaN if the granule holds one."""
    low, high = value_range(x, granularity)
    return torch.maximum(low.neg_(), high)


def value_range(x: Tensor, granularity: Granularity, *, hold_zero: bool = True) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each granule, float32, in the shape of the scales; NaN if the granule holds one.

    hold_zero: widen the range to contain 0. The range of an empty granule is 0.
    """
    x = x.detach()
    shape = granularity.scale_shape(x.shape)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)
    low, high = _row_ranges(x, granularity)
    low = _over_rows(low, x.shape, granularity, torch.amin).reshape(shape)
    high = _over_rows(high, x.shape, granularity, torch.amax).reshape(shape)
    return (low.clamp_(max=0), high.clamp_(min=0)) if hold_zero else (low, high)


def spread(per_granule: Tensor, shape: tuple[int, ...] | torch.Size, granularity: Granularity) -> Tensor:
    """What each granule has, in the shape of the scales, for every value: a tensor that broadcasts to `shape`."""
    if granularity.kind not in ("group", "block"):
        return per_granule
    columns = per_granule.repeat_interleave(granularity.size, -1)[..., : shape[-1]]
    if granularity.kind == "group":
        return columns
    return columns.repeat_interleave(granularity.rows, 0)[: shape[0]]


def as_matrix(x: Tensor, granularity: Granularity) -> Tensor:
    """x as a matrix [rows, columns]; a view where its strides allow it. x is not empty."""
    rows = math.prod(x.shape[:-1])
    if _by_first_axis(x.dim(), granularity):
        rows = x.shape[0]
    return x.reshape(rows, -1)


def per_row(per_granule: Tensor, shape: tuple[int, ...] | torch.Size, granularity: Granularity) -> Tensor:
    """What each granule has, in the shape of the scales, as float32 [rows, granules a row] or [1, granules a row].

    The numbers of whole tensors may also be [N, 1, ...]: several tensors joined along axis 0, one for each row.
    """
    t = per_granule.to(torch.float32)
    if t.numel() == 1:
        return t.reshape(1, 1)
    if _by_first_axis(len(shape), granularity):
        return t.reshape(shape[0], 1)
    match granularity.kind:
        case "group":
            return t.reshape(-1, t.shape[-1])
        case "block":
            return t.repeat_interleave(granularity.rows, 0)[: shape[0]]
        case _ if t.shape[-1] == 1:
            return t.expand(*shape[:-1], 1).reshape(-1, 1)
        case _:
            return t.reshape(1, -1)  # one for each index of the last axis


def in_place(
    op: Callable[[Tensor, Tensor], Tensor], values: Tensor, per_granule: Tensor, granularity: Granularity
) -> None:
    """op(values, per_granule), in place, of rows of `as_matrix` and the rows of `per_row` that belong to them."""
    columns, granules = values.shape[1], per_granule.shape[1]
    if granules in (1, columns):
        op(values, per_granule)
        return
    width = granularity.size
    whole = columns // width
    op(values[:, : whole * width].unflatten(1, (whole, width)), per_granule[:, :whole, None])
    if columns % width:
        op(values[:, whole * width :], per_granule[:, whole:])


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows, each about as much as stays in cache."""
    size = CPU_BLOCK if matrix.device.type == "cpu" else DEVICE_BLOCK
    step = max(1, size // max(1, matrix.shape[1]))
    return (slice(start, min(start + step, matrix.shape[0])) for start in range(0, matrix.shape[0], step))


def rows_of(per_granule: Tensor, rows: slice) -> Tensor:
    """The rows of what `per_row` gives; the one row that stands for all."""
    return per_granule if per_granule.shape[0] == 1 else per_granule[rows]


def _by_first_axis(ndim: int, granularity: Granularity) -> bool:
    kind = granularity.kind
    return kind == "sample" or (kind == "channel" and granularity.axis % ndim == 0)


def _row_ranges(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each granule within each row of the matrix, float32 [rows, granules a row].

    Where granules go across all rows, a row stands for a block of rows.
    """
    matrix = as_matrix(x, granularity)
    of_all = granularity == TENSOR
    of_columns = granularity.kind == "channel" and granularity.axis % x.dim() == x.dim() - 1 and x.dim() > 1
    low, high = [], []
    for rows in row_blocks(matrix):
        values = matrix[rows].to(torch.float32)
        for op, found in ((torch.amin, low), (torch.amax, high)):
            if of_all:
                found.append(op(values).reshape(1, 1))
            elif of_columns:
                found.append(op(values, 0, keepdim=True))
            else:
                found.append(_over_columns(values, granularity, op))
    return torch.cat(low), torch.cat(high)


def _over_columns(values: Tensor, granularity: Granularity, op: Callable[..., Tensor]) -> Tensor:
    columns, width = values.shape[1], granularity.size
    if granularity.kind not in ("group", "block") or width >= columns:
        return op(values, 1, keepdim=True)
    whole = columns // width
    head = op(values[:, : whole * width].unflatten(1, (whole, width)), 2)
    return torch.cat([head, op(values[:, whole * width :], 1, keepdim=True)], 1) if columns % width else head


def _over_rows(
    found: Tensor, shape: tuple[int, ...] | torch.Size, granularity: Granularity, op: Callable[..., Tensor]
) -> Tensor:
    """Fold the ranges of rows into those of granules that go across rows."""
    match granularity.kind:
        case "tensor":
            return op(found)
        case "block":
            whole = found.shape[0] // granularity.rows
            parts = [
                op(part.unflatten(0, (-1, min(granularity.rows, part.shape[0]))), 1)
                for part in (found[: whole * granularity.rows], found[whole * granularity.rows :])
                if part.shape[0]
            ]
            return torch.cat(parts)
        case "channel" if not _by_first_axis(len(shape), granularity):
            axis = granularity.axis % len(shape)
            if axis == len(shape) - 1:
                return op(found, 0)
            other = [i for i in range(len(shape)) if i != axis]
            return op(found.reshape(*shape[:-1], 1), other)
        case _:
            return found
