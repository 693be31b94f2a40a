"""Which tiles decoded_mm is tried with on which architecture, how much it decodes at a time, and from how many rows."""

from __future__ import annotations

from typing import NamedTuple

from fxquant.spec import TensorSpec
from fxquant.target import Arch, Problem
from fxquant.triton_kernels.decoded_weight import is_scaled, slab_width

SLAB_BYTES = 64 * 1024**2
SLAB_MULTIPLE = 256  # rows: no tile has more
# Rows of x from which decoding apart may pay: where scales are applied to groups of sums, or codes are spread over
# planes; and where coded_mm decodes in few instructions.
_DEAR, _CHEAP = 257, 1025
_CHEAP_BITS, _WIDE_GROUP = (4, 8), 128


class Tile(NamedTuple):
    """Rows of x, rows of the weight, columns of an iteration, warps, stages; programs a processor, 0: one a tile."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 0


_TILES: dict[str, tuple[Tile, ...]] = {
    "sm80": (Tile(128, 256, 32, 8, 4), Tile(128, 128, 32, 4, 4), Tile(256, 128, 32, 8, 4), Tile(64, 128, 64, 4, 4)),
    "sm89": (Tile(128, 256, 32, 8, 3), Tile(128, 128, 32, 4, 4), Tile(256, 128, 32, 8, 3), Tile(64, 128, 32, 4, 4)),
    "sm90": (
        Tile(128, 256, 64, 8, 4, 1), Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 3, 2), Tile(64, 128, 64, 4, 4),
    ),
    "sm100": (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
    "gfx942": (Tile(256, 256, 64, 8, 2), Tile(128, 128, 64, 4, 2), Tile(256, 128, 64, 8, 2), Tile(64, 128, 64, 4, 2)),
}  # fmt: skip


def tiles_for(problem: Problem, arch: Arch) -> tuple[Tile, ...]:
    """All of the architecture's; those whose tiles fill its processors first."""
    processors = arch.board.processors

    def idle(tile: Tile) -> float:
        count = -(-problem.m // tile.m) * -(-problem.n // tile.n)
        return -(-count // processors) * processors / count

    tiles = _TILES[arch.name]
    return tuple(sorted(tiles, key=lambda tile: idle(tile) > 4 / 3))


def slab_rows(problem: Problem) -> int:
    """Rows of the weight that are decoded at a time: as many as `SLAB_BYTES` hold, in whole tiles; all, if they do."""
    row = 2 * slab_width(TensorSpec.parse(problem.weights), max(problem.k, 1))
    most = max(SLAB_BYTES // max(row, 1) // SLAB_MULTIPLE, 1)
    return min(most, -(-max(problem.n, 1) // SLAB_MULTIPLE)) * SLAB_MULTIPLE


def least_rows(problem: Problem) -> int:
    """Rows of x from which it is worth a try."""
    spec = TensorSpec.parse(problem.weights)
    narrow = is_scaled(spec, problem.k) and spec.granularity.size < _WIDE_GROUP
    return _DEAR if narrow or spec.format.bits not in _CHEAP_BITS else _CHEAP
