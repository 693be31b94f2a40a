"""Granules as the rows of matrices, a block at a time, and these in cache-sized parts.

Whatever the granularity, a search for good ranges sees rows [g, S], each row one granule. What it computes from every
value goes part by part, each so small that it stays in the second-level cache; what it computes from every granule goes
block by block, so that there are few operations on small tensors. A weight in bfloat16 or float16 is widened block by
block, never as a whole. What is found for one granule does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.spec import Granularity

# 128 KB of float32: a part and its temporaries stay in the second-level cache, and torch runs an operation on so few
# values in the calling thread. With more, each of some ten thousand operations would end in a barrier of threads of
# some microseconds' work; where another process holds one of the cores, each then waits for a time slice.
CPU_PART = 2**15
CPU_BLOCK = 2**19
# Elsewhere every operation costs a launch.
DEVICE_PART = 2**24


@dataclass(frozen=True)
class Rows:
    """Some granules of one size [g, S], in float32 if they are no more than a block, else in the tensor's dtype."""

    values: Tensor

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Which granules, and values of them in float32 [p, w]: all of them, unless one granule is more than a part."""
        granules, size = self.values.shape
        part = CPU_PART if self.values.device.type == "cpu" else DEVICE_PART
        step = max(1, part // size)
        for start in range(0, granules, step):
            here = slice(start, min(start + step, granules))
            for values in self.values[here].split(min(size, part), 1):
                yield here, values.to(torch.float32)


def _block_size(x: Tensor) -> int:
    return CPU_BLOCK if x.device.type == "cpu" else DEVICE_PART


def blocks(
    x: Tensor, of_granules: Sequence[Tensor], granularity: Granularity
) -> Iterator[tuple[Rows, tuple[Tensor, ...]]]:
    """All granules of x block by block, each with views of what they have, of any shape, in the order of the rows.

    x: not empty; copied in its own dtype if its strides do not allow a view. of_granules: in the shape of the scales.
    """
    if granularity.kind == "channel":
        x = x.movedim(granularity.axis, 0)
    height, width, tile_height, tile_width = _matrix(x.shape, granularity)
    matrix = x.reshape(height, width)
    tiles = (-(-height // tile_height), -(-width // tile_width))
    numbers = [each.view(tiles) for each in of_granules]
    for down, rows in _cuts(height, tile_height):
        for across, columns in _cuts(width, tile_width):
            part = _tiled(matrix, down, rows, across, columns)
            yield from _blocks_of(part, [each[rows.tiles, columns.tiles] for each in numbers])


@dataclass(frozen=True)
class _Cut:
    """Tiles of one length along one axis: what part of the axis they cover, and which tiles they are."""

    values: slice
    tiles: slice


def _matrix(shape: torch.Size, granularity: Granularity) -> tuple[int, int, int, int]:
    """The tensor as a matrix whose tiles are the granules: (height, width, tile height, tile width)."""
    count, last = math.prod(shape), shape[-1] if shape else 1
    match granularity.kind:
        case "tensor":
            return 1, count, 1, count
        case "channel" | "sample":
            return shape[0], count // shape[0], 1, count // shape[0]
        case "block":
            return count // last, last, granularity.rows, granularity.size
        case kind:
            size = last if kind == "token" else min(granularity.size, last)
            # Groups that fill their rows are rows themselves: a block may then end inside of what was a row.
            return (count // last, last, 1, size) if last % size else (count // size, size, 1, size)


def _cuts(length: int, tile: int) -> Iterator[tuple[int, _Cut]]:
    """The whole tiles along an axis, and the shorter one at its end: (length of a tile, which)."""
    whole = length // tile
    if whole:
        yield tile, _Cut(slice(0, whole * tile), slice(0, whole))
    if length % tile:
        yield length % tile, _Cut(slice(whole * tile, length), slice(whole, whole + 1))


def _tiled(matrix: Tensor, tile_height: int, rows: _Cut, tile_width: int, columns: _Cut) -> Tensor:
    """The tiles as [down, across, height, width], a view."""
    part = matrix[rows.values, columns.values]
    return part.unflatten(1, (-1, tile_width)).unflatten(0, (-1, tile_height)).transpose(1, 2)


def _blocks_of(tiles: Tensor, of_granules: Sequence[Tensor]) -> Iterator[tuple[Rows, tuple[Tensor, ...]]]:
    down, across, height, width = tiles.shape
    size = _block_size(tiles)
    step = max(1, size // (across * height * width))
    for start in range(0, down, step):
        here = slice(start, start + step)
        values = tiles[here].reshape(-1, height * width)
        if values.numel() <= size:
            values = values.to(torch.float32).contiguous()
        yield Rows(values), tuple(each[here] for each in of_granules)
