"""Which tiles of coded_mm and coded_mv are worth a try on which architecture: what fits registers and shared memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from fxquant.numerics.tiles import chunk_width
from fxquant.spec import TensorSpec
from fxquant.target import Arch, Problem
from fxquant.triton_kernels.coded_products import coded_meta
from fxquant.triton_kernels.operands import DTYPES

MOST_SPLITS = 16
LEAST_CHUNKS = 4  # of a split: below, starting a program costs more than its share


class Tile(NamedTuple):
    """Rows of x, rows of the weight, shares of K, warps, stages of the pipeline."""

    m: int
    n: int
    splits: int
    warps: int
    stages: int


# (rows of x, rows of the weight, warps), by how many rows of x there are; a warp group of sm90 takes 64 rows of the
# weight, a warp of mma.sync 16. Best guess first.
_SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    16: ((16, 64, 4), (16, 128, 4), (16, 128, 8), (16, 64, 2), (32, 64, 4)),
    32: ((32, 64, 4), (32, 128, 4), (16, 128, 8), (32, 128, 8), (64, 64, 4)),
    64: ((64, 64, 4), (64, 128, 8), (32, 128, 4), (32, 64, 4), (64, 128, 4), (64, 64, 8)),
    128: ((64, 128, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (32, 64, 4)),
    1 << 30: (
        (128, 128, 8), (64, 128, 8), (128, 256, 8), (64, 128, 4), (64, 256, 8), (64, 64, 4), (64, 64, 8), (32, 128, 8),
        (32, 64, 4),
    ),
}  # fmt: skip
_LAST = (16, 64, 4)  # where no other fits
# Sums that a thread may hold, of all and of a group. Operands in float32 need room as well, and so do those of a chunk
# that is multiplied in many products, whose decoding the compiler interleaves.
_SUMS, _FEW_SUMS, MANY_PRODUCTS = 128, 32, 8
_LOAD = 16  # bytes


def by_unit(arch: Arch) -> int:
    """1 if the architecture converts float8_e4m3fn by an instruction of its own."""
    return int(arch.float8 and arch.backend == "cuda")


def tiles_for(problem: Problem, arch: Arch) -> tuple[Tile, ...]:
    """Tiles of coded_mm for the problem, best guess first, at least one."""
    spec = TensorSpec.parse(problem.weights)
    meta = coded_meta(spec, problem.k, DTYPES[problem.dtype])
    shapes = next(shapes for most, shapes in _SHAPES.items() if problem.m <= most)
    most = _FEW_SUMS if meta["WIDE"] or meta["CHUNK"] // meta["STEP"] >= MANY_PRODUCTS else _SUMS
    found: list[tuple[int, int, int, int]] = []
    for m, n, warps in (*shapes, _LAST):
        if (m, n, warps) == _LAST and found:
            break
        sums = m * n // (warps * arch.warp_size) * (2 if meta["MODE"] == "group" else 1)
        stages = _stages(m, n, problem, arch, meta)
        if stages and (sums <= most or (m, n, warps) == _LAST) and (warps >= 4 or not arch.tensor_maps):
            found.append((m, n, warps, stages))
    if not arch.tensor_maps:  # 16 bytes of the weight for each thread, if any tile has them
        found.sort(key=lambda tile: tile[1] * meta["STEP"] < _LOAD * tile[2] * arch.warp_size)
    return _with_splits(found, problem, arch)


def _with_splits(found: list[tuple[int, int, int, int]], problem: Problem, arch: Arch) -> tuple[Tile, ...]:
    tiles = []
    for m, n, warps, stages in found:
        programs = -(-problem.m // m) * -(-problem.n // n)
        splits = _splits(programs, 2 if m <= 32 else 1, problem, arch)
        tiles.append(Tile(m, n, splits, warps, stages))
        if splits > 1 and len(tiles) == 1:
            tiles += [Tile(m, n, splits // 2, warps, stages), Tile(m, n, splits * 2, warps, stages)]
    return tuple(dict.fromkeys(tiles))


def _stages(m: int, n: int, problem: Problem, arch: Arch, meta: dict[str, Any]) -> int:
    """The depth of the pipeline that shared memory allows, up to 4; 0 if not even 2 fit.

    Of small tiles two programs should fit a processor. float32 operands of a matrix unit stand there once more.
    """
    item = DTYPES[problem.dtype].itemsize
    stage = meta["CHUNK"] * (m * item + n * meta["BITS"] // 8)
    once = meta["STEP"] * m * 8 if meta["WIDE"] else 0
    if meta["MODE"] == "value":
        stage += meta["CHUNK"] * n * 8
    room = arch.shared_per_block - once
    if m <= 32:
        room = min(room, arch.shared // 2 - once)
    if m * n * 4 > arch.shared_per_block:  # the result on its way out, when nothing else is there
        return 0
    deepest = 2 if arch.backend == "hip" else 4
    unused = 0 if arch.compute == 90 else 1  # wgmma reads its operands until the next stage is loaded
    stages = next((count for count in range(deepest, 1, -1) if (count - unused) * stage <= room), 0)
    return stages or (2 if (m, n) == _LAST[:2] else 0)


def _splits(programs: int, each: int, problem: Problem, arch: Arch) -> int:
    """A power of two that makes about `each` programs for each processor, where K is long enough for that."""
    spec = TensorSpec.parse(problem.weights)
    chunks = -(-problem.k // chunk_width(spec.format.bits))
    most = each * arch.board.processors * 5 // 4
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * LEAST_CHUNKS <= chunks and 2 * splits * programs <= most:
        splits *= 2
    return splits


def most_rows(problem: Problem) -> int:
    """Rows of x that coded_mv takes: 4, or 2 where a chunk is so many parts that a program would grow too long."""
    meta = coded_meta(TensorSpec.parse(problem.weights), problem.k, DTYPES[problem.dtype])
    return 2 if meta["CHUNK"] // meta["STEP"] >= MANY_PRODUCTS else 4


def strips_for(problem: Problem, arch: Arch) -> tuple[tuple[int, int, int, int], ...]:
    """(BLOCK_N, SPLIT_K, AHEAD, num_warps) of coded_mv, best guess first: enough programs to fill the board."""
    rows = min(problem.m, 4)
    ahead = 2 if arch.backend == "hip" else 4
    shapes = ((64, 4), (32, 4), (128, 4), (32, 2), (16, 2)) if rows <= 2 else ((32, 4), (16, 2), (64, 4), (32, 2))
    found = []
    for n, warps in shapes:
        splits = _splits(-(-problem.n // n), 4, problem, arch)
        found.append((n, splits, ahead, warps))
        if n == shapes[0][0] and splits > 1 and len(found) == 1:
            found.append((n, splits // 2, ahead, warps))
            found.append((n, splits, 1, warps))
    return tuple(dict.fromkeys(found))
