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
    16: ((16, 64, 4), (16, 128, 4), (16, 128, 8), (16, 64, 2), (32, 64, 4), (16, 128, 2)),
    32: ((32, 64, 4), (32, 128, 4), (16, 128, 8), (32, 128, 8), (64, 64, 4)),
    64: ((64, 64, 4), (64, 128, 8), (32, 128, 4), (32, 64, 4), (64, 128, 4), (64, 64, 8)),
    128: ((64, 128, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (32, 64, 4)),
    1 << 30: (
        (128, 128, 8), (64, 128, 8), (128, 256, 8), (64, 128, 4), (64, 256, 8), (64, 64, 4), (64, 64, 8), (32, 128, 8),
        (32, 128, 4), (32, 64, 4),
    ),
}  # fmt: skip
_LAST = (16, 64, 4)  # where no other fits
# Registers that a thread may hold of sums (those of a group are another set) and of a decoded chunk; fewer where
# mma.sync multiplies, or a chunk has several groups. Where operands are float32, or a chunk is multiplied in many
# products, whose decoding the compiler interleaves, so many of sums alone.
_REGISTERS, _FEWER_REGISTERS = 160, 128
_FEW_SUMS, MANY_PRODUCTS = 32, 8
_TENSOR_MEMORY = 512  # columns of it that a processor of sm100 has, of 128 rows of 4 bytes
LOAD = 16  # bytes
_WARP_GROUP = 4  # warps
_MFMA = 32  # rows and columns of AMD's instruction, where the tile has them: warps beyond do others' products again


def by_unit(arch: Arch) -> int:
    """1 if the architecture converts float8_e4m3fn by an instruction of its own."""
    return int(arch.float8 and arch.backend == "cuda")


def tiles_for(problem: Problem, arch: Arch) -> tuple[Tile, ...]:
    """Tiles of coded_mm for the problem, best guess first, at least one."""
    spec = TensorSpec.parse(problem.weights)
    meta = coded_meta(spec, problem.k, DTYPES[problem.dtype])
    shapes = next(shapes for most, shapes in _SHAPES.items() if problem.m <= most)
    found: list[tuple[int, int, int, int]] = []
    for m, n, warps in (*shapes, _LAST):
        if (m, n, warps) == _LAST and found:
            break
        stages = _stages(m, n, problem, arch, meta)
        fits = (m, n, warps) == _LAST or not (
            _spills(m, n, warps, arch, meta)
            or (arch.tensor_maps and warps < _WARP_GROUP)
            or (arch.backend == "hip" and m >= _MFMA and m * n < warps * _MFMA**2)
        )
        if stages and fits:
            found.append((m, n, warps, stages))
    if not arch.tensor_maps:  # only those that read 16 bytes of the weight a thread, if any does
        found = [tile for tile in found if tile[1] * meta["STEP"] >= LOAD * tile[2] * arch.warp_size] or found
    return _with_splits(found, problem, arch)


def _spills(m: int, n: int, warps: int, arch: Arch, meta: dict[str, Any]) -> bool:
    """Whether a thread would need more registers than it has, as far as one can say without compiling it."""
    threads, groups = warps * arch.warp_size, meta["MODE"] == "group"
    sums = m * n // threads * (2 if groups else 1)
    if meta["WIDE"] or meta["CHUNK"] // meta["STEP"] >= MANY_PRODUCTS:
        return sums > _FEW_SUMS
    fewer = (arch.backend == "cuda" and not arch.tensor_maps) or (groups and meta["UNIT"] < meta["CHUNK"])
    return sums + n * meta["CHUNK"] // threads // 2 > (_FEWER_REGISTERS if fewer else _REGISTERS)


def _tensor_memory(m: int, n: int, meta: dict[str, Any]) -> int:
    """Columns of sm100's tensor memory: the sums of a chunk's groups, each with its room, and a decoded chunk."""
    groups = meta["CHUNK"] // meta["UNIT"] if meta["MODE"] == "group" else 1
    return (m * groups + meta["CHUNK"] // (1 if meta["WIDE"] else 2)) * n // 128


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

    Of small tiles two programs should fit a processor, if they can. float32 operands of a matrix unit stand
    there once more.
    """
    item = DTYPES[problem.dtype].itemsize
    stage = meta["CHUNK"] * (m * item + n * meta["BITS"] // 8)
    once = meta["STEP"] * m * 8 if meta["WIDE"] else 0
    if meta["MODE"] == "value":
        stage += meta["CHUNK"] * n * 8
    room = arch.shared_per_block - once
    if m * n * 4 > arch.shared_per_block:  # the result on its way out, when nothing else is there
        return 0
    if arch.compute == 100 and _tensor_memory(m, n, meta) > _TENSOR_MEMORY:
        return 0
    many = meta["CHUNK"] // meta["STEP"] >= MANY_PRODUCTS
    deepest = 2 if arch.backend == "hip" else 4 if arch.tensor_maps or not many else 3
    unused = 0 if arch.tensor_maps else 1  # wgmma and tcgen05 read their operands until the next stage is loaded
    counts = range(deepest, 1, -1)
    rooms = (min(room, arch.shared // 2 - once), room) if m <= 32 else (room,)
    stages = next((count for most in rooms for count in counts if (count - unused) * stage <= most), 0)
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
    # With 8 columns a thread of one product, most loads become 16 bytes: compilers join those of two products.
    step = coded_meta(TensorSpec.parse(problem.weights), problem.k, DTYPES[problem.dtype])["STEP"]
    shapes = [s for s in shapes if s[0] * step >= LOAD // 2 * s[1] * arch.warp_size] or [(128, 4)]
    found = []
    for n, warps in shapes:
        splits = _splits(-(-problem.n // n), 4, problem, arch)
        found.append((n, splits, ahead, warps))
        if n == shapes[0][0] and splits > 1 and len(found) == 1:
            found.append((n, splits // 2, ahead, warps))
            found.append((n, splits, 1, warps))
    return tuple(dict.fromkeys(found))
