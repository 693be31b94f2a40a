"""Which tiles the kernels of 8-bit codes are tried with, for each architecture, and the guess which of them is best.

All of them were compiled for their architecture: they spill no registers. Larger ones do, or one of them in float8.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.spec import TensorSpec
from fxquant.target import Arch, Problem
from fxquant.triton_kernels.scaled_products import AS_THEY_ARE, BY_SHIFTS, decode_for, kind_of


@dataclass(frozen=True)
class Tile:
    """A tile of the result [m, n], how much of K is loaded at once, warps, and how many such loads are under way.

    only  'int8' where the float32 sums of float8 would need too many registers.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    only: str = ""

    def shared(self, arch: Arch, decode: int) -> int:
        """Bytes of shared memory for both operands. The load that is multiplied has room of its own where the matrix
        unit reads shared memory itself, asynchronously. Codes that shifts decode lie there in float16 on one side."""
        buffers = self.stages if arch.tensor_maps and self.m >= 64 else max(self.stages - 1, 1)
        return (self.m + self.n * (2 if decode == BY_SHIFTS else 1)) * self.k * buffers


@dataclass(frozen=True)
class PersistentTile:
    """A tile, programs a processor, and fields of scaled_mm_persistent."""

    tile: Tile
    programs: int = 1
    halves: int = 0
    specialize: int = 0


# Those with fewer rows than 64 are for as few rows of x.
_TILES: dict[str, tuple[Tile, ...]] = {
    "sm80": (
        Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 4), Tile(128, 128, 128, 8, 4), Tile(128, 128, 64, 4, 4),
        Tile(64, 256, 64, 4, 4), Tile(64, 128, 128, 4, 4), Tile(128, 64, 128, 4, 4), Tile(64, 64, 128, 4, 4),
        Tile(32, 128, 128, 4, 5), Tile(32, 64, 256, 4, 4), Tile(16, 128, 128, 4, 5), Tile(16, 64, 256, 4, 5),
        Tile(16, 32, 256, 2, 6),
    ),
    "sm89": (
        Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 4), Tile(128, 128, 128, 8, 4), Tile(128, 128, 64, 4, 4),
        Tile(64, 256, 64, 4, 4), Tile(64, 128, 128, 4, 3), Tile(128, 64, 128, 4, 3), Tile(64, 64, 128, 4, 4),
        Tile(32, 128, 128, 4, 4), Tile(32, 64, 256, 4, 3), Tile(16, 128, 128, 4, 5), Tile(16, 64, 256, 4, 4),
        Tile(16, 32, 256, 2, 6),
    ),
    "sm90": (
        Tile(128, 256, 128, 8, 4, "int8"), Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 8, 4),
        Tile(128, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4), Tile(64, 64, 128, 4, 5), Tile(64, 64, 256, 4, 4),
        Tile(32, 128, 128, 4, 5), Tile(32, 64, 256, 4, 5), Tile(16, 128, 128, 4, 6), Tile(16, 64, 256, 4, 5),
        Tile(16, 32, 256, 2, 6),
    ),
    "sm100": (
        Tile(128, 128, 128, 8, 5), Tile(128, 64, 128, 4, 6), Tile(64, 128, 128, 4, 6), Tile(64, 64, 256, 4, 5),
        Tile(32, 128, 128, 4, 6), Tile(32, 64, 256, 4, 6), Tile(16, 128, 128, 4, 6), Tile(16, 64, 256, 4, 6),
        Tile(16, 32, 256, 2, 6),
    ),
    "gfx942": (
        Tile(256, 256, 64, 8, 2, "int8"), Tile(256, 128, 128, 8, 2), Tile(128, 256, 128, 8, 2),
        Tile(128, 128, 128, 4, 2), Tile(128, 64, 128, 4, 2), Tile(64, 128, 128, 4, 2), Tile(64, 64, 128, 4, 2),
        Tile(64, 64, 256, 4, 2), Tile(32, 128, 128, 4, 2), Tile(16, 128, 128, 4, 2),
        Tile(16, 64, 256, 4, 2), Tile(16, 32, 256, 2, 2),
    ),
}  # fmt: skip
# sm90: two programs a processor, so that one multiplies while the other finishes; float8 with 8 warps also adds.
_PERSISTENT: dict[str, tuple[PersistentTile, ...]] = {
    "sm90": (
        PersistentTile(Tile(128, 256, 128, 8, 4, "int8")),
        PersistentTile(Tile(128, 128, 128, 4, 3, "int8"), programs=2),
        PersistentTile(Tile(128, 128, 128, 8, 4)),
        PersistentTile(Tile(128, 64, 128, 4, 4), programs=2),
    ),
    "sm100": (
        PersistentTile(Tile(128, 256, 128, 8, 4), halves=1, specialize=1),
        PersistentTile(Tile(128, 256, 128, 8, 4), halves=1),
        PersistentTile(Tile(128, 128, 128, 4, 5), halves=1, specialize=1),
        PersistentTile(Tile(128, 128, 128, 8, 5)),
    ),
}
_MOST = 8
PIECES = (2, 3, 4, 6, 8, 12, 16)
_START, _SECOND_KERNEL = 1.0e-6, 1.5e-6  # seconds, of the guess: until a program has its first loads; one kernel more


def tiles_for(problem: Problem, arch: Arch) -> tuple[Tile, ...]:
    """At most 8 tiles that fit, best guess first."""
    return tuple(sorted(_fitting(problem, arch), key=lambda tile: guessed_time(tile, 1, problem, arch))[:_MOST])


def splits_for(problem: Problem, arch: Arch) -> tuple[tuple[Tile, int], ...]:
    """At most 8 tiles with how many pieces K is cut into, best guess first; none if no cut seems to pay."""
    tiles = _fitting(problem, arch)
    whole = min(guessed_time(tile, 1, problem, arch) for tile in tiles)
    times = {
        (tile, pieces): guessed_time(tile, pieces, problem, arch)
        for tile in tiles
        for pieces in PIECES
        if pieces * tile.k * 2 <= problem.k
    }
    return tuple(split for split in sorted(times, key=lambda split: times[split]) if times[split] < whole)[:_MOST]


def persistent_tiles_for(problem: Problem, arch: Arch) -> tuple[PersistentTile, ...]:
    """Those of which some program has to make a second one, and that rows fill by half; best guess first."""
    kind = kind_of(TensorSpec.parse(problem.weights))
    some = [
        one
        for one in _PERSISTENT.get(arch.name, ())
        if one.tile.only in ("", kind)
        and problem.m * 2 > one.tile.m
        and _count(one.tile, problem) > one.programs * arch.board.processors
    ]
    # Warps of their own for loads are for the tuner to try: what they do on a board no compiler shows.
    return tuple(sorted(some, key=lambda one: (one.specialize, guessed_time(one.tile, 1, problem, arch))))


def guessed_time(tile: Tile, pieces: int, problem: Problem, arch: Arch) -> float:
    """Seconds: rounds that the processors need for all programs, by products and loads of a program; and the second
    kernel that adds pieces up. Only good for an order; `fxquant.tuning` knows better."""
    board, unit = arch.board, kind_of(TensorSpec.parse(problem.weights))
    products = board.operations[unit if decode_for(problem, arch) == AS_THEY_ARE else "float16"] / 2 / board.processors
    loads = board.cache_bandwidth / board.processors
    rounds = -(-_count(tile, problem) * pieces // board.processors)
    program = (tile.m * tile.n / products + (tile.m + tile.n) / loads) * problem.k / pieces + _START
    # However fast programs are, the weight has to be read; of those that are fast enough the faster one.
    time = max(rounds * program, problem.n * problem.k / board.bandwidth + _START) + rounds * program / 16
    if pieces > 1:
        time += _SECOND_KERNEL + 8 * pieces * problem.m * problem.n / board.cache_bandwidth
    return time


def _count(tile: Tile, problem: Problem) -> int:
    return -(-problem.m // tile.m) * -(-problem.n // tile.n)


def _fitting(problem: Problem, arch: Arch) -> list[Tile]:
    """Those for the kind of codes whose loads fit shared memory."""
    kind, decode = kind_of(TensorSpec.parse(problem.weights)), decode_for(problem, arch)
    return [
        tile
        for tile in _TILES[arch.name]
        if tile.only in ("", kind) and tile.shared(arch, decode) <= arch.shared_per_block
    ]
