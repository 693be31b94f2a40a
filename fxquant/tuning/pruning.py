"""Pruning: configurations that need not be tried, by what compiling says of them; and the order of the others.

Nothing here needs a GPU: facts come from machine code, times from a model. Both are handed in.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fxquant.target import Arch, KernelConfig, Problem


class CompiledFacts(Protocol):
    """What pruning reads of `fxquant.tuning.facts.Facts`."""

    @property
    def registers(self) -> int: ...
    @property
    def spills(self) -> int: ...
    @property
    def shared(self) -> int: ...
    @property
    def warps(self) -> int: ...


FactsOf = Callable[[Problem, KernelConfig, Arch], Any]
SecondsOf = Callable[[Problem, KernelConfig, Arch, Any], float]


@dataclass(frozen=True)
class Dropped:
    """A configuration that is out, and why."""

    config: KernelConfig
    reason: str


@dataclass(frozen=True)
class Ranked:
    """A configuration that may run, and its time by the model: inf where that knows none, as of a library's."""

    config: KernelConfig
    seconds: float


def why_drop(facts: CompiledFacts, arch: Arch) -> str:
    """Why a configuration with these facts is not worth running on the architecture; '' if it may be."""
    if facts.shared > arch.shared_per_block:
        return f"it needs {facts.shared} bytes of shared memory, a block has {arch.shared_per_block}"
    if facts.registers * facts.warps * arch.warp_size > arch.registers:
        return f"{facts.warps} warps of {facts.registers} registers a thread pass the processor's {arch.registers}"
    if facts.spills:
        return f"it spills registers ({facts.spills} instructions or registers)"
    return ""


def shortlist(candidates: Sequence[KernelConfig], most: int | None) -> list[KernelConfig]:
    """So many of the candidates, by turns the best guesses of each kernel: they come kernel by kernel."""
    if most is None:
        return list(candidates)
    by_kernel = [list(of_one) for _, of_one in itertools.groupby(candidates, key=lambda config: config.kernel)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_kernel))
    return [config for config in turns if config is not None][:most]


def ranked(
    problem: Problem, candidates: Sequence[KernelConfig], arch: Arch, facts_of: FactsOf, seconds_of: SecondsOf
) -> tuple[list[Ranked], list[Dropped]]:
    """The candidates that may run, fastest by the model first, and those that are out.

    If none is left that the model knows, the first that compiles stays: it runs, if slowly. Raises what the compiler
    raised if none does.
    """
    kept: list[Ranked] = []
    dropped: list[Dropped] = []
    spare: tuple[KernelConfig, Any] | None = None
    failed: Exception | None = None
    for config in candidates:
        try:
            facts = facts_of(alike(problem), config, arch)
        except Exception as error:
            failed = failed or error
            dropped.append(Dropped(config, f"it does not compile: {type(error).__name__}: {error}".partition("\n")[0]))
            continue
        if why := why_drop(facts, arch):
            spare = spare or (config, facts)
            dropped.append(Dropped(config, why))
        else:
            kept.append(Ranked(config, seconds_of(problem, config, arch, facts)))
    if spare is not None and all(math.isinf(one.seconds) for one in kept):
        config, facts = spare
        kept.append(Ranked(config, seconds_of(problem, config, arch, facts)))
        dropped = [out for out in dropped if out.config != config]
    if not kept and failed is not None:
        raise failed
    return sorted(kept, key=lambda one: one.seconds), dropped


def alike(problem: Problem) -> Problem:
    """A problem that compiles to the same code, the same one for many sizes: compiling takes a second.

    Code depends on a large size only by what divides it: a tile, 16 bytes, 2; these are powers of two.
    """
    m = problem.m if problem.m < _LARGE else _LARGE
    n, k = (size if size < _LARGE else _LARGE + min(size & -size, _LARGE) % _LARGE for size in (problem.n, problem.k))
    return dataclasses.replace(problem, m=m, n=n, k=k)


_LARGE = 4096  # no tile is longer
