"""tune: measure, or without a device model, the problems of which no good enough plan is known, and remember them."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxquant.cpu_kernels.build import BuildFailed
from fxquant.errors import NoRightAnswer, NothingToTune
from fxquant.target import Arch, KernelConfig, Problem, Target
from fxquant.tuning.candidates import CpuSpace, Space, arch_of, space_of
from fxquant.tuning.measuring import Bench, CpuBench, GpuBench
from fxquant.tuning.measuring.racing import FULL, QUICK, hopeful, race
from fxquant.tuning.plans.cache import PlanCache
from fxquant.tuning.plans.lookup import caches_of, usable
from fxquant.tuning.plans.records import Effort, Entry, Source
from fxquant.tuning.pruning import Dropped, FactsOf, Ranked, SecondsOf, ranked, shortlist

logger = logging.getLogger("fxquant")


@dataclass(frozen=True)
class Outcome:
    """What tuning one problem came to.

    known     nothing was done: the cache had an entry that serves.
    dropped   configurations that were never run, or whose answer was wrong, with the reasons.
    measured  how many configurations were timed.
    """

    entry: Entry
    known: bool = False
    dropped: tuple[Dropped, ...] = ()
    measured: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a tuning run stands: before each problem with no outcome, after it with one."""

    done: int
    total: int
    problem: Problem
    outcome: Outcome | None = None


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Tuner:
    """Tunes problems of one target.

    bench       measures; None where the device is not here: then the model chooses.
    facts_of, seconds_of  of compiled kernels: facts, and the model's time. None for kernels that have none, a CPU's.
    """

    space: Space
    cache: PlanCache
    bench: Bench | None
    arch: Arch | None = None
    facts_of: FactsOf | None = None
    seconds_of: SecondsOf | None = None

    def tune(self, problems: Iterable[Problem], effort: Effort = "quick", watch: Watch = unwatched) -> list[Outcome]:
        """Tune each problem once, at the end of its bucket of rows; those that no kernel takes are left out.

        Each result is written before the next begins, so an interrupted run loses one problem. A cache that can't be
        written is a warning in the log; the results hold for this call. So is a problem for which the device has no
        memory: it is left out.
        """
        asked = problems if self.arch is None else (problem.without_steps() for problem in problems)
        wanted = [p for p in dict.fromkeys(problem.bucketed() for problem in asked) if self.space.candidates(p)]
        outcomes = []
        for done, problem in enumerate(wanted):
            watch(Progress(done, len(wanted), problem))
            try:
                outcome = self._known(problem, effort) or self._tuned(problem, effort)
            except torch.OutOfMemoryError as error:
                logger.warning("%s is not tuned: %s", problem, str(error).partition("\n")[0])
                continue
            if not outcome.known:
                self._remember(outcome.entry)
                logger.info("tuned %s: %s, %.2f x the heuristic", problem, outcome.entry.config, outcome.entry.gain)
            outcomes.append(outcome)
            watch(Progress(done + 1, len(wanted), problem, outcome))
        return outcomes

    def _known(self, problem: Problem, effort: Effort) -> Outcome | None:
        entry = usable(self.cache.read().get(problem), self.space)
        serves = entry is not None and entry.serves(effort, measured=self.bench is not None)
        return Outcome(entry, known=True) if entry is not None and serves else None

    def _tuned(self, problem: Problem, effort: Effort) -> Outcome:
        candidates = self.space.candidates(problem)
        first = candidates[0]
        how = FULL if effort == "full" else QUICK
        order, dropped = self._by_model(problem, shortlist(candidates, how.compiled))
        if self.bench is None:
            return self._modelled(problem, first, order, dropped, effort)
        unknown = [one for one in order if math.isinf(one.seconds)]  # to the model: measuring alone can tell
        configs = [one.config for one in (*order[: how.most], *unknown)]
        configs = list(dict.fromkeys((first, *configs)))
        case = self.bench.case(problem)
        right = []
        for config in configs:
            if wrong := case.wrong(config):
                logger.warning("%s: %s gives a wrong answer, it is not used: %s", problem, config, wrong)
                dropped.append(Dropped(config, wrong))
            else:
                right.append(config)
        if not right:
            reasons = "; ".join(f"{out.config}: {out.reason}" for out in dropped)
            raise NoRightAnswer(problem, reasons)
        result = race(hopeful(right, case.probe), case.sample, how)
        entry = self._entry(problem, result.winner, "tuned", result.seconds, result.heuristic_seconds, effort)
        return Outcome(entry, dropped=tuple(dropped), measured=len(right))

    def _by_model(self, problem: Problem, candidates: Sequence[KernelConfig]) -> tuple[list[Ranked], list[Dropped]]:
        if self.arch is None or self.facts_of is None or self.seconds_of is None:
            return [Ranked(config, 0.0) for config in candidates], []
        return ranked(problem, candidates, self.arch, self.facts_of, self.seconds_of)

    def _modelled(
        self,
        problem: Problem,
        first: KernelConfig,
        order: Sequence[Ranked],
        dropped: Sequence[Dropped],
        effort: Effort,
    ) -> Outcome:
        best = order[0]
        if math.isinf(best.seconds):
            raise NothingToTune(self.cache.device, f"the model knows no configuration of {problem} that fits there")
        of_first = next((one.seconds for one in order if one.config == first), best.seconds)
        of_first = best.seconds if math.isinf(of_first) else of_first
        entry = self._entry(problem, best.config, "modelled", best.seconds, of_first, effort)
        return Outcome(entry, dropped=tuple(dropped))

    def _entry(
        self,
        problem: Problem,
        config: KernelConfig,
        source: Source,
        seconds: float,
        heuristic_seconds: float,
        effort: Effort,
    ) -> Entry:
        kernel_source = self.space.kernel_source(config.kernel)
        ours, theirs = (float(f"{value:.4g}") for value in (seconds, heuristic_seconds))
        return Entry(problem, config, source, kernel_source, ours, theirs, effort)

    def _remember(self, entry: Entry) -> None:
        try:
            self.cache.write([entry])
        except (BuildFailed, OSError) as error:
            logger.warning("the plan of %s cannot be kept: %s", entry.problem, error)


def tuner_for(target: Target | Arch | str, folder: Path | None = None) -> Tuner:
    """The tuner of a target: it measures on this machine's CPU or GPU, and goes by the model for a GPU elsewhere.

    `folder` is the user's cache, for tests. Raises `InvalidOption` for an unknown architecture, `NothingToTune` where
    there are no kernels: a CPU without a compiler, a GPU without Triton.
    """
    cache = caches_of(target, folder)[0]
    space = space_of(target)
    if isinstance(space, CpuSpace):
        if not space.isas:
            raise NothingToTune("this CPU", "its kernels are not built (see the warning about the compiler)")
        return Tuner(space, cache, CpuBench())
    if importlib.util.find_spec("triton") is None:
        raise NothingToTune(target, "Triton is not installed")
    from fxquant.tuning.facts import facts_of
    from fxquant.tuning.model import modelled_time

    def seconds_of(problem: Problem, config: KernelConfig, arch: Arch, facts: Any) -> float:
        return modelled_time(problem, config, arch, facts).seconds

    arch = arch_of(target)
    bench = GpuBench(arch.board.cache) if cache.device.name else None
    return Tuner(space, cache, bench, arch, facts_of, seconds_of)
