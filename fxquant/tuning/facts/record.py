"""Facts: what compiling says about a configuration, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HotLoop:
    """Instructions of one warp in one iteration of the hot loop, by what they do.

    The hot loop is the innermost loop with matrix instructions, else the one with most loads from global memory, else
    (`is_loop` False) the whole function. Prologue and epilogue of a pipelined loop don't count.

    matrix        how many of each matrix instruction, by its name in machine code.
    operations    multiplications and additions that they do in an iteration, for the whole block.
    matrix_loads  ldmatrix. shared_loads, shared_stores: all others on shared memory.
    async_copies  global to shared memory past the registers, by bytes per thread (cp.async; AMD's loads to LDS).
    bulk_copies   whole tiles by descriptor (TMA).
    global_loads, global_stores  by bytes per thread. atomics: all on global memory.
    local         to and from a thread's own memory: spilled registers.
    barriers      of a block, and waits for copies or matrix instructions.
    divisions     of integers, however they are written out.
    integer, floating, conversions  arithmetic and logic outside matrix instructions; moves count as integer.
    control       branches, predicates of warps, no-ops. other: what is in no group above. total: all.
    """

    is_loop: bool
    matrix: Mapping[str, int] = field(default_factory=dict)
    operations: int = 0
    matrix_loads: int = 0
    shared_loads: int = 0
    shared_stores: int = 0
    async_copies: Mapping[int, int] = field(default_factory=dict)
    bulk_copies: int = 0
    global_loads: Mapping[int, int] = field(default_factory=dict)
    global_stores: Mapping[int, int] = field(default_factory=dict)
    atomics: int = 0
    local: int = 0
    barriers: int = 0
    divisions: int = 0
    integer: int = 0
    floating: int = 0
    conversions: int = 0
    control: int = 0
    other: int = 0
    total: int = 0

    @property
    def read_bytes(self) -> Mapping[int, int]:
        """Bytes that a thread reads from global memory in an iteration, by the width of the access; without TMA."""
        widths = sorted({*self.async_copies, *self.global_loads})
        return {w: w * (self.async_copies.get(w, 0) + self.global_loads.get(w, 0)) for w in widths}

    @property
    def wide_share(self) -> float:
        """Of the bytes read in an iteration, how much comes in accesses of 16 bytes or more; 1.0 where TMA reads."""
        read = self.read_bytes
        total = sum(read.values())
        if not total:
            return 1.0
        return sum(size for width, size in read.items() if width >= 16) / total


@dataclass(frozen=True)
class LaunchFacts:
    """One launch of a configuration, as it was compiled.

    registers      of a thread; on AMD vector registers, accumulators among them.
    spills         instructions that move registers to or from local memory; on AMD vector registers spilled.
    shared         bytes of shared memory of a block. tensor_memory: columns of it (sm100).
    intermediate   matrix instructions in the whole of the PTX, by PTX's name; empty on AMD.
    bulk_copies    of tiles by descriptor (TMA) in the whole function: other warps than those of the loop may make them.
    """

    function: str
    registers: int
    spills: int
    shared: int
    warps: int
    tensor_memory: int
    intermediate: Mapping[str, int]
    loop: HotLoop
    bulk_copies: int = 0


_NOTHING = LaunchFacts("", 0, 0, 0, 1, 0, {}, HotLoop(is_loop=False))


@dataclass(frozen=True)
class Facts:
    """All launches of a configuration, in the order in which its launcher makes them; none of torch's own kernels."""

    launches: tuple[LaunchFacts, ...]

    @property
    def main(self) -> LaunchFacts:
        """The launch that does the work: most operations, then most instructions in its loop."""
        return max(self.launches, key=lambda launch: (launch.loop.operations, launch.loop.total), default=_NOTHING)

    @property
    def registers(self) -> int:
        return max((launch.registers for launch in self.launches), default=0)

    @property
    def spills(self) -> int:
        return sum(launch.spills for launch in self.launches)

    @property
    def shared(self) -> int:
        return max((launch.shared for launch in self.launches), default=0)

    @property
    def warps(self) -> int:
        return self.main.warps

    @property
    def loop(self) -> HotLoop:
        return self.main.loop

    def to_json(self) -> list[dict[str, Any]]:
        """A list of launches; counts that are 0 are left out."""
        return [launch_to_json(launch) for launch in self.launches]

    @staticmethod
    def from_json(launches: list[dict[str, Any]]) -> Facts:
        return Facts(tuple(launch_from_json(fields) for fields in launches))


_BY_WIDTH = ("async_copies", "global_loads", "global_stores")


def launch_to_json(launch: LaunchFacts) -> dict[str, Any]:
    fields = {name: value for name, value in dataclasses.asdict(launch).items() if name != "loop"}
    loop = dataclasses.asdict(launch.loop)
    for name in _BY_WIDTH:
        loop[name] = {str(width): count for width, count in sorted(loop[name].items())}
    return {**fields, "loop": {name: value for name, value in loop.items() if value or name == "is_loop"}}


def launch_from_json(fields: Mapping[str, Any]) -> LaunchFacts:
    loop = dict(fields["loop"])
    for name in _BY_WIDTH:
        loop[name] = {int(width): count for width, count in loop.get(name, {}).items()}
    return LaunchFacts(**{**fields, "loop": HotLoop(**loop)})
