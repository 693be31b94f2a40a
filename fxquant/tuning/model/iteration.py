"""What one iteration of a block's hot loop costs a processor, resource by resource, in cycles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fxquant.target import Arch
from fxquant.tuning.facts.record import HotLoop, LaunchFacts
from fxquant.tuning.model.tiling import Tiling

# Bytes of a thread in one ldmatrix; and in other accesses to shared memory, whose widths of 1 to 16 are not counted.
MATRIX_WIDTH, SHARED_WIDTH = 16, 8
_GROUP_WIDE = re.compile(r"[IHQB]GMMA\.(\d+)x(\d+)x(\d+)")
_BLOCK_WIDE = "UTC"
_OPERAND_BYTES = 32  # of one row of an operand in a matrix instruction, whatever its format


@dataclass(frozen=True)
class Iteration:
    """cycles: by resource, of one block alone on a processor. loaded: bytes from beyond the processor. under_way: bytes
    of loads that a block has started before it waits for the first of them."""

    cycles: Mapping[str, float]
    loaded: float
    under_way: float


def iteration_of(facts: LaunchFacts, tiling: Tiling, arch: Arch) -> Iteration:
    """One iteration of that launch, as the tiling cuts K: a loop that the compiler has unrolled counts in parts."""
    loop, threads = facts.loop, facts.warps * arch.warp_size
    unrolled = _unrolled(loop, tiling, threads)
    instructions = loop.total * facts.warps / arch.issued
    arithmetic = sum(getattr(loop, kind) * threads / lanes for kind, lanes in arch.lanes.items())
    loaded = tiling.loaded + loop.local * 4 * threads / unrolled
    cycles = {
        "matrix": _matrix_cycles(facts, arch) / unrolled,
        "instructions": max(instructions, arithmetic) / unrolled,
        "shared memory": _shared_bytes(loop, tiling, facts, arch, unrolled) / arch.shared_rate,
        "cache": loaded / arch.cache_rate,
    }
    return Iteration(cycles, loaded, _under_way(facts, tiling, threads))


def unit_of_loop(loop: HotLoop) -> str:
    """The unit of the loop's matrix instructions; 'float32' if there are none."""
    name = max(loop.matrix, key=lambda one: loop.matrix[one], default="").upper()
    if not name:
        return "float32"
    if "IMMA" in name or "IGMMA" in name or "MFMA_I32" in name:
        return "int8"
    if "FP8" in name or "BF8" in name or "QMMA" in name or "QGMMA" in name:
        return "float8"
    if "OMMA" in name or "F8F6F4" in name:
        return "float4" if "OMMA" in name else "float8"
    return "float16"


def kept_operations(facts: LaunchFacts, arch: Arch) -> float:
    """The share of its peak that the board keeps up of the loop's unit."""
    return arch.board.kept(unit_of_loop(facts.loop)) if facts.loop.matrix else 1.0


def _matrix_cycles(facts: LaunchFacts, arch: Arch) -> float:
    loop, board = facts.loop, arch.board
    if not loop.operations:
        return 0.0
    name = next(iter(loop.matrix))
    wide = bool(_GROUP_WIDE.match(name)) or name.startswith(_BLOCK_WIDE) or arch.backend == "hip"
    unit = unit_of_loop(loop)
    tf32 = 2 if "TF32" in name.upper() else 1
    rate = board.rate(unit) / (board.processors * board.clock * 1e9) * (1.0 if wide else arch.warp_matrix)
    return max(loop.operations * tf32 / rate, _operand_bytes(loop, facts.warps) / arch.shared_rate)


def _operand_bytes(loop: HotLoop, warps: int) -> float:
    """Bytes that instructions of a warp group read from shared memory themselves: rows of both operands.

    This is Luo et al.'s table of wgmma by N: 18, 20, 24, 32, 64, 128 cycles for N = 8, 16, 32, 64, 128, 256.
    """
    read = 0.0
    for name, count in loop.matrix.items():
        if found := _GROUP_WIDE.match(name):
            read += (int(found[1]) + int(found[2])) * _OPERAND_BYTES * count * (warps // 4)
    return read


def _shared_bytes(loop: HotLoop, tiling: Tiling, facts: LaunchFacts, arch: Arch, unrolled: float) -> float:
    """Bytes of a block in and out of shared memory, without what matrix instructions read of it themselves."""
    threads = facts.warps * arch.warp_size
    plain = (loop.shared_loads + loop.shared_stores) * SHARED_WIDTH
    moved = (loop.matrix_loads * MATRIX_WIDTH + plain) * threads
    copied = sum(width * count for width, count in loop.async_copies.items()) * threads
    return (moved + copied) / unrolled + (tiling.loaded if _bulk(facts) else 0.0)


def _under_way(facts: LaunchFacts, tiling: Tiling, threads: int) -> float:
    """Copies to shared memory fill all stages but the one in use; loads to registers are those of one iteration."""
    loop = facts.loop
    if loop.async_copies or _bulk(facts):
        return max(float(facts.shared), tiling.loaded)
    return max(tiling.loaded * tiling.ahead, sum(loop.read_bytes.values()) * threads)


def _bulk(facts: LaunchFacts) -> bool:
    """Tiles are loaded by descriptor, in the loop or by other warps."""
    return bool(facts.loop.bulk_copies or facts.bulk_copies)


def _unrolled(loop: HotLoop, tiling: Tiling, threads: int) -> float:
    """Iterations of the source in one of the machine code, by the bytes that it reads."""
    read = sum(loop.read_bytes.values()) * threads
    if not loop.is_loop or not read or not tiling.loaded:
        return 1.0
    times = read / tiling.loaded
    return float(2 ** max(0, round(times).bit_length() - 1)) if times >= 1.5 else 1.0
