"""The model of time: how long a configuration takes on an architecture's board, by what compiling says of it.

No figure here belongs to one kernel: what a block costs comes from its machine code (`Facts`) and its tile, what the
hardware does from `Arch` and `Board`, whose sources stand there. `docs/gpu-model.md` says it in full and compares it
with published timings. All times are modelled, never measured.

A launch makes blocks, of which each processor holds `occupancy` at once: they run in waves, the last of which may leave
processors idle. A wave takes the longest of these, in each iteration of the hot loop:

matrix        operations of the blocks on one processor, at the unit's rate there.
instructions  all that its warps start, at `Arch.issued` a cycle; arithmetic at `Arch.lanes`.
shared memory what is copied into it and read out of it, at `Arch.shared_rate`.
cache         bytes between cache and processor, at `Arch.cache_rate` and the board's `cache_bandwidth`.
latency       what its loads under way can bring at most: so many bytes each `Board.latency`.
memory        bytes that no earlier block has left in the cache, at the bandwidth that is attained.

A block that is alone on its processor takes `Arch.round_trip` more than its longest resource in each iteration.
Before the first wave there is the launch and a first load, after the last one the result is written; between waves of
several blocks a processor these are hidden behind the others. Launches that sum up split products are such kernels too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.tuning.facts.record import Facts, LaunchFacts
from fxquant.tuning.model.iteration import Iteration, iteration_of, kept_operations
from fxquant.tuning.model.slabs import decoding, of_product, products_of
from fxquant.tuning.model.tiling import Tiling, tiling_of
from fxquant.tuning.model.traffic import memory_bytes
from fxquant.tuning.model.work import Roofline, roofline_of, work_of
from fxquant.tuning.occupancy import occupancy_of

COMPUTING = ("matrix", "instructions", "shared memory")  # resources that masked rows and columns take as well
EPILOGUE_INSTRUCTIONS = 12  # of a thread for each result: scales, conversion, address, bounds


@dataclass(frozen=True)
class Modelled:
    """What the model says of one configuration.

    seconds    of a call: launches and all that runs. kernel: without the gaps between launches.
    bound_by   what takes longest in a full wave: 'matrix', 'instructions', 'shared memory', 'cache', 'latency',
               'memory'.
    roofline   the least that the problem takes on that board.
    waves      rounds of blocks, with the share of the last one that is filled. occupancy: blocks a processor.
    lost       seconds beyond the attainable roofline by reason: 'launch' (gaps, first load, last store, summing up of
               split products), 'waves' (idle processors), 'tiles' (masked rows and columns), 'decoding' (of a weight
               that is written out before it is multiplied), 'mix' (all else).
    """

    seconds: float
    kernel: float
    bound_by: str
    roofline: Roofline
    waves: float
    occupancy: int
    lost: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Times of the roofline that the board attains."""
        return self.seconds / self.roofline.attainable

    @property
    def reason(self) -> str:
        """What most of the time beyond the roofline goes to."""
        return max(self.lost, key=lambda name: self.lost[name], default="")


def modelled_time(problem: Problem, config: KernelConfig, arch: Arch, facts: Facts) -> Modelled:
    """The time of a configuration with these facts. One that a processor cannot hold takes forever; so does a library's
    kernel, which has no parameters: of its product there is no machine code, so only measuring can prefer it."""
    roofline = roofline_of(work_of(problem), arch.board)
    if not config.values or not facts.launches:
        return Modelled(math.inf, math.inf, "unknown", roofline, 0.0, 0)
    main = facts.main
    occupancy = occupancy_of(
        arch, registers=main.registers, shared=main.shared, warps=main.warps, tensor_memory=main.tensor_memory
    ).blocks
    if occupancy == 0:
        return Modelled(math.inf, math.inf, "occupancy", roofline, 0.0, 0)
    if products := products_of(problem, config):
        return _slab_by_slab(problem, config, products, arch, facts)
    tiling = tiling_of(problem, config)
    if tiling.programs:
        occupancy = min(occupancy, math.ceil(tiling.programs / arch.board.processors))
    running = _Running(problem, arch, main, tiling, occupancy)
    loop, bound_by = running.loop()
    fixed = arch.board.latency + running.store() + _extra_launches(problem, arch, facts, tiling)
    kernel = loop + fixed
    gaps = arch.board.launch * len(facts.launches)
    waves = tiling.blocks / (arch.board.processors * occupancy)
    # Idle processors take nothing from the others' bandwidth.
    even = loop if bound_by == "memory" else loop * waves / max(math.ceil(waves), 1)
    useful = even * (tiling.useful if bound_by in COMPUTING else 1.0)
    lost = {"launch": gaps + fixed, "waves": loop - even, "tiles": even - useful, "mix": useful - roofline.attainable}
    seconds = max(gaps + kernel, roofline.attainable)
    return Modelled(seconds, max(kernel, roofline.attainable), bound_by, roofline, waves, occupancy, lost)


def _slab_by_slab(
    problem: Problem, config: KernelConfig, products: list[tuple[Problem, int]], arch: Arch, facts: Facts
) -> Modelled:
    """Each slab of the weight decoded by a launch of its own, then multiplied as a plain matrix."""
    roofline, plain = roofline_of(work_of(problem), arch.board), of_product(config)
    parts = [(modelled_time(one, plain, arch, Facts((facts.main,))), count) for one, count in products]
    slabs = sum(count for _, count in parts)
    decoded = decoding(problem, arch, facts) + slabs * arch.board.latency
    gaps = slabs * arch.board.launch
    seconds = max(sum(count * part.seconds for part, count in parts) + decoded + gaps, roofline.attainable)
    lost = {name: sum(count * part.lost[name] for part, count in parts) for name in ("launch", "waves", "tiles", "mix")}
    lost["launch"] += gaps
    lost["decoding"] = seconds - roofline.attainable - sum(lost.values())
    first = parts[0][0]
    gap = 2 * slabs * arch.board.launch
    return Modelled(seconds, seconds - gap, first.bound_by, roofline, first.waves, first.occupancy, lost)


@dataclass(frozen=True)
class _Running:
    """One launch on one architecture."""

    problem: Problem
    arch: Arch
    facts: LaunchFacts
    tiling: Tiling
    occupancy: int

    def loop(self) -> tuple[float, str]:
        """Seconds of all waves, and what bounds a full one (of a launch without a full wave: the only one)."""
        held = self.arch.board.processors * self.occupancy
        full, rest = divmod(self.tiling.blocks, held)
        waves = [(held, full)] if full else []
        if rest:
            waves.append((rest, 1))
        total, bound_by = 0.0, "memory"
        for i, (blocks, count) in enumerate(waves):
            times = self.wave(blocks)
            longest = max(times, key=lambda name: times[name])
            bound_by = longest if i == 0 else bound_by
            total += times[longest] * count
        between = max(math.ceil(self.tiling.blocks / held) - 1, 0)
        filled = 0.0 if self.tiling.specialized else self.arch.board.latency
        return total + between * (filled + self.store()) / self.occupancy, bound_by

    def wave(self, blocks: int) -> dict[str, float]:
        """Seconds of the iterations of that many blocks at once, by resource."""
        board, arch = self.arch.board, self.arch
        on_one = -(-blocks // board.processors)
        busy = min(blocks, board.processors)
        it = iteration_of(self.facts, self.tiling, arch)
        # Power limits a whole board that multiplies, not a few processors of it.
        kept = kept_operations(self.facts, arch) if busy == board.processors else 1.0
        alone = {name: spent / (kept if name == "matrix" else 1.0) for name, spent in it.cycles.items()}
        cycles = {name: spent * on_one for name, spent in alone.items()}
        slowest = max(alone, key=lambda name: alone[name])
        cycles[slowest] = max(cycles[slowest], alone[slowest] + arch.round_trip)
        clock = board.clock * 1e9
        cycles["latency"] = _cycles_to_load(it, board.latency * clock)
        times = {name: spent * self.tiling.iterations / clock for name, spent in cycles.items()}
        cached = it.loaded * self.tiling.iterations * blocks / board.cache_bandwidth
        times["cache"] = max(times["cache"], cached)
        moved = memory_bytes(self.problem, self.tiling, board.cache, held=board.processors * self.occupancy)
        share = blocks / self.tiling.blocks
        times["memory"] = moved * share / (board.bandwidth * board.attainable)
        return times

    def store(self) -> float:
        """Seconds from a block's last product to its results in memory, alone on its processor."""
        tile = self.tiling
        clock = self.arch.board.clock * 1e9
        results = tile.block_m * tile.block_n
        computed = results / self.arch.warp_size * EPILOGUE_INSTRUCTIONS / self.arch.issued
        written = results * tile.result_bytes / self.arch.cache_rate
        return max(computed, written) / clock


def _cycles_to_load(it: Iteration, latency: float) -> float:
    """Cycles in which the loads that a block has under way bring what it takes in an iteration (Little's law)."""
    return it.loaded * latency / it.under_way if it.under_way else 0.0


def _extra_launches(problem: Problem, arch: Arch, facts: Facts, tiling: Tiling) -> float:
    """Seconds of all launches but the main one: they read what it left, mostly in the cache, and write the result."""
    others = len(facts.launches) - 1
    if not others:
        return 0.0
    board = arch.board
    parts = tiling.split_k * problem.m * problem.n * 4 if tiling.split_k > 1 else 0
    rate = board.cache_bandwidth if parts <= board.cache else board.bandwidth * board.attainable
    return others * board.latency + 2 * parts / rate
