"""Arch and Board: what the kernels' GPU targets can do, and what one board of each does at most.

Limits of an architecture: CUDA C++ Programming Guide, "Compute Capabilities"; AMD "CDNA 3" ISA guide and the MI300X
data sheet. Figures of boards: the makers' data sheets, dense (without sparsity).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fxquant.errors import InvalidOption, nearest

KIB = 1024


@dataclass(frozen=True)
class Board:
    """One product: processors, clock in GHz, bytes a second, bytes of cache, operations a second by unit."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    cache: int
    cache_bandwidth: float
    operations: Mapping[str, float]


@dataclass(frozen=True)
class Arch:
    """What kernels are compiled for.

    name        'sm90', 'gfx942'.
    backend     Triton's name of it: 'cuda' or 'hip'; with `compute` and `warp_size` its GPUTarget.
    float8, scaled_dot, tensor_maps  has matrix instructions on float8 (e4m3fn, e5m2; gfx942's are of the fnuz kind); on
                block-scaled formats; loads tiles by descriptor (TMA).
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

    def __str__(self) -> str:
        return self.name


A100 = Board(
    "A100-SXM4-80GB", 108, 1.41, 2.039e12, 40 * KIB**2, 5.0e12,
    {"float32": 19.5e12, "float16": 312e12, "int8": 624e12},
)  # fmt: skip
L40S = Board(
    "L40S", 142, 2.52, 0.864e12, 96 * KIB**2, 4.0e12,
    {"float32": 91.6e12, "float16": 362e12, "int8": 733e12, "float8": 733e12},
)  # fmt: skip
H100 = Board(
    "H100-SXM5-80GB", 132, 1.83, 3.35e12, 50 * KIB**2, 7.0e12,
    {"float32": 67e12, "float16": 989.4e12, "int8": 1978.9e12, "float8": 1978.9e12},
)  # fmt: skip
B200 = Board(
    "B200-SXM-180GB", 148, 1.85, 8.0e12, 126 * KIB**2, 12.0e12,
    {"float32": 75e12, "float16": 2250e12, "int8": 4500e12, "float8": 4500e12, "float4": 9000e12},
)  # fmt: skip
MI300X = Board(
    "MI300X", 304, 2.1, 5.3e12, 256 * KIB**2, 17.2e12,
    {"float32": 163.4e12, "float16": 1307.4e12, "int8": 2614.9e12, "float8": 2614.9e12},
)  # fmt: skip

ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm80", "cuda", 80, A100, shared=164 * KIB, shared_per_block=163 * KIB),
        Arch(
            "sm89", "cuda", 89, L40S, max_threads=1536, max_blocks=24, shared=100 * KIB, shared_per_block=99 * KIB,
            float8=True,
        ),
        Arch(
            "sm90", "cuda", 90, H100, shared=228 * KIB, shared_per_block=227 * KIB, float8=True, tensor_maps=True,
        ),
        Arch(
            "sm100", "cuda", 100, B200, shared=228 * KIB, shared_per_block=227 * KIB, float8=True, scaled_dot=True,
            tensor_maps=True,
        ),
        Arch(
            "gfx942", "hip", "gfx942", MI300X, warp_size=64, max_registers=512, registers=4 * 512 * 64,
            shared=64 * KIB, shared_per_block=64 * KIB, float8=True,
        ),
    )
}  # fmt: skip


def arch_named(name: str) -> Arch:
    """The architecture of that name; raises `InvalidOption` with the nearest."""
    if name in ARCHS:
        return ARCHS[name]
    near = nearest(name, list(ARCHS))
    raise InvalidOption("target", name, f"it takes {', '.join(ARCHS)}" + (f"; did you mean {near!r}?" if near else ""))
