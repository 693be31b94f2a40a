"""Arch and Board: what the kernels' GPU targets can do, and what one board of each does, at most and in practice.

Limits of an architecture: CUDA C++ Programming Guide, "Compute Capabilities" and "Arithmetic Instructions"; AMD
"CDNA 3" ISA guide. Peaks of boards: the makers' data sheets, dense (without sparsity). What is reached of them, and
latencies: published measurements, named beside each figure of `docs/gpu-model.md` by these letters:

A  Luo et al., "Dissecting the NVIDIA Hopper Architecture", arXiv:2501.12084 (H800, A100, RTX 4090).
B  S. Bekman, ml-engineering, "Maximum Achievable Matmul FLOPS", cuBLAS on cold caches.
C  AMD, "Measuring Max-Achievable FLOPs, part 2", rocm.blogs.amd.com, February 2025.
D  Chips and Cheese on the H100, the MI300X and the B200; NHR@FAU, te42kyfo/gpu-benches.
E  NVIDIA, "Getting Started with CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fxquant.errors import InvalidOption, nearest

KIB = 1024


@dataclass(frozen=True)
class Board:
    """One product.

    processors, clock  how many, and GHz when boosting.
    bandwidth          bytes a second of its memory, by the data sheet; `attainable`: what a stream reaches of it.
    cache, cache_bandwidth  bytes of the last cache, and bytes a second that it was measured to deliver.
    operations         a second, by unit, by the data sheet; `sustained`: what the board keeps up of it within its power
                       limit, the most that was ever measured in a product of matrices.
    latency            seconds from asking for bytes of memory to having them, while others are asked for.
    launch             seconds between two kernels of a CUDA graph in which nothing runs.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    cache: int
    cache_bandwidth: float
    operations: Mapping[str, float] = field(hash=False)
    attainable: float = 1.0
    sustained: Mapping[str, float] = field(default_factory=dict, hash=False)
    latency: float = 600e-9
    launch: float = 0.5e-6

    def rate(self, unit: str) -> float:
        """Operations a second of that unit by the data sheet; where there is none, of the next wider."""
        return self.operations[self.unit(unit)]

    def kept(self, unit: str) -> float:
        """What the board keeps up of that unit's peak."""
        return self.sustained.get(self.unit(unit), 1.0)

    def unit(self, wanted: str) -> str:
        """The unit that does this board's products in that format."""
        if wanted in self.operations:
            return wanted
        wider = _WIDER[_WIDER.index(wanted) + 1 :] if wanted in _WIDER else ()
        return next((unit for unit in wider if unit in self.operations), "float32")


_WIDER = ("float4", "float8", "float16", "float32")


@dataclass(frozen=True)
class Arch:
    """What kernels are compiled for.

    name        'sm90', 'gfx942'.
    backend     Triton's name of it: 'cuda' or 'hip'; with `compute` and `warp_size` its GPUTarget.
    float8, scaled_dot, tensor_maps  has matrix instructions on float8 (e4m3fn, e5m2; gfx942's are of the fnuz kind); on
                block-scaled formats; loads tiles by descriptor (TMA).
    issued      instructions of a warp that a processor starts in a cycle.
    lanes       threads' results of a processor in a cycle, by kind of instruction (the fields of `HotLoop`).
    shared_rate, cache_rate  bytes in a cycle between a processor and its shared memory, and the cache.
    warp_matrix what matrix instructions of one warp (mma.sync) reach of the peak that those of several warps do.
    round_trip  cycles from a load of shared memory over one matrix instruction to its result: what a block waits in
                each iteration.
    """

    name: str
    backend: Literal["cuda", "hip"]
    compute: int | str
    board: Board
    warp_size: int = 32
    max_threads: int = 2048  # of a processor
    max_blocks: int = 32
    registers: int = 65536  # of 32 bits, of a processor
    max_registers: int = 255  # of a thread
    shared: int = 0  # bytes, of a processor
    shared_per_block: int = 0
    float8: bool = False
    scaled_dot: bool = False
    tensor_maps: bool = False
    issued: int = 4
    lanes: Mapping[str, int] = field(
        default_factory=lambda: {"integer": 64, "floating": 128, "conversions": 64}, hash=False
    )
    shared_rate: int = 128
    cache_rate: int = 64
    warp_matrix: float = 1.0
    round_trip: int = 62  # 29 of shared memory (A), 33 of an m16n8k16 (Sun et al., arXiv:2206.02874)

    def __str__(self) -> str:
        return self.name


# Of int8 nothing was published but that wgmma does as much of it as of float8 (A, table 8): float8's share.
A100 = Board(
    "A100-SXM4-80GB", 108, 1.41, 2.039e12, 40 * KIB**2, 5.0e12,
    {"float32": 19.5e12, "float16": 312e12, "int8": 624e12},
    attainable=0.90, sustained={"float16": 0.869, "int8": 0.869},
)  # fmt: skip
L40S = Board(
    "L40S", 142, 2.52, 0.864e12, 96 * KIB**2, 4.0e12,
    {"float32": 91.6e12, "float16": 362e12, "int8": 733e12, "float8": 733e12},
    attainable=0.92,
)  # fmt: skip
H100 = Board(
    "H100-SXM5-80GB", 132, 1.83, 3.35e12, 50 * KIB**2, 8.2e12,
    {"float32": 67e12, "float16": 989.4e12, "int8": 1978.9e12, "float8": 1978.9e12},
    attainable=0.91, sustained={"float16": 0.803, "float8": 0.709, "int8": 0.709}, latency=608e-9,
)  # fmt: skip
B200 = Board(
    "B200-SXM-180GB", 148, 1.85, 7.672e12, 126 * KIB**2, 21.0e12,
    {"float32": 75e12, "float16": 2250e12, "int8": 4500e12, "float8": 4500e12, "float4": 9000e12},
    attainable=0.88, sustained={"float16": 0.776, "float8": 0.633, "int8": 0.633, "float4": 0.633}, latency=860e-9,
)  # fmt: skip
MI300X = Board(
    "MI300X", 304, 2.1, 5.3e12, 256 * KIB**2, 11.9e12,
    {"float32": 163.4e12, "float16": 1307.4e12, "int8": 2614.9e12, "float8": 2614.9e12},
    attainable=0.79, sustained={"float16": 0.541, "float8": 0.487, "int8": 0.487}, launch=2e-6,
)  # fmt: skip

ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch(
            "sm80", "cuda", 80, A100, shared=164 * KIB, shared_per_block=163 * KIB,
            lanes={"integer": 64, "floating": 64, "conversions": 64},
        ),
        Arch(
            "sm89", "cuda", 89, L40S, max_threads=1536, max_blocks=24, shared=100 * KIB, shared_per_block=99 * KIB,
            float8=True,
        ),
        Arch(
            "sm90", "cuda", 90, H100, shared=228 * KIB, shared_per_block=227 * KIB, float8=True, tensor_maps=True,
            warp_matrix=0.629,  # A, section 6.2
        ),
        Arch(
            "sm100", "cuda", 100, B200, shared=228 * KIB, shared_per_block=227 * KIB, float8=True, scaled_dot=True,
            tensor_maps=True, cache_rate=128,  # as its cache was measured to deliver more than 64 to each processor
            warp_matrix=0.314,  # not published: Hopper's operations a cycle
        ),
        Arch(
            "gfx942", "hip", "gfx942", MI300X, warp_size=64, max_registers=512, registers=4 * 512 * 64,
            shared=64 * KIB, shared_per_block=64 * KIB, float8=True,
            issued=5, lanes={"integer": 64, "floating": 64, "conversions": 64}, round_trip=128,
        ),
    )
}  # fmt: skip


def arch_named(name: str) -> Arch:
    """The architecture of that name; raises `InvalidOption` with the nearest."""
    if name in ARCHS:
        return ARCHS[name]
    near = nearest(name, list(ARCHS))
    raise InvalidOption("target", name, f"it takes {', '.join(ARCHS)}" + (f"; did you mean {near!r}?" if near else ""))
