"""How many blocks of a kernel a processor holds at once: CUDA C++ Programming Guide, "Hardware Multithreading"."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.target import Arch

REGISTER_STEP = 8  # registers of a thread are given in steps of this
RESERVED_SHARED = 1024  # bytes that the system takes of each block's shared memory, since sm80
TENSOR_COLUMNS = 512  # of a processor's tensor memory (sm100)


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a processor holds, and what keeps it from holding more."""

    blocks: int
    limited_by: str


def occupancy_of(arch: Arch, *, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> Occupancy:
    """Of a block of that many warps with that many registers a thread, bytes of shared memory and columns of tensor
    memory. None fits if one of them is more than a block may have: 0 blocks."""
    threads = warps * arch.warp_size
    held = -(-max(registers, 1) // REGISTER_STEP) * REGISTER_STEP * threads
    reserved = RESERVED_SHARED if arch.backend == "cuda" else 0
    limits = {
        "blocks": arch.max_blocks,
        "threads": arch.max_threads // threads,
        "registers": arch.registers // held,
        "shared memory": arch.shared // (shared + reserved) if shared else arch.max_blocks,
        "tensor memory": TENSOR_COLUMNS // tensor_memory if tensor_memory else arch.max_blocks,
    }
    if registers > arch.max_registers:
        limits["registers"] = 0
    if shared > arch.shared_per_block:
        limits["shared memory"] = 0
    least = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[least], least)
