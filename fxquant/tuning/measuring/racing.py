"""race: which of several configurations is fastest, from samples of their times; knows no device and no clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxquant.target import KernelConfig

# One timing of a configuration, in seconds.
Sample = Callable[[KernelConfig], float]


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    rounds    of the race.  final: rounds of the final.
    compiled  of the candidates so many, the best guesses, are compiled to be judged by the model.
    most      so many of these, the model's best, are measured.
    """

    rounds: int
    final: int
    compiled: int | None = None
    most: int | None = None


QUICK, FULL = Budget(rounds=5, final=9, compiled=12, most=4), Budget(rounds=15, final=25)
_HOPELESS = 3.0  # so many times slower than the best at its first sample: out
_LOSING = 1.25  # so many times slower at its best than the leader's median after `_ROUNDS_TO_TELL`: out
_ROUNDS_TO_TELL = 3


@dataclass(frozen=True)
class Timing:
    """Samples of one configuration."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """The distance of the quartiles: what two runs of the same thing may differ by."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class Race:
    """What came out: the configuration to use, its time, and that of the first candidate, the heuristic's."""

    winner: KernelConfig
    seconds: float
    heuristic_seconds: float
    out: tuple[KernelConfig, ...]  # given up before the end, slowest first


def race(candidates: Sequence[KernelConfig], sample: Sample, budget: Budget) -> Race:
    """Time candidates in turns, the first being the heuristic's; the winner must beat it by more than the noise.

    Turns alternate, forwards and backwards, so that a machine that slows down slows all alike. One that is hopeless at
    its first sample, or still clearly behind after three, is given up. The fastest and the heuristic's then meet in a
    final of fresh samples, since the best of many noisy times is partly luck: unless the medians there differ by more
    than the spread of either, the heuristic's stays.
    """
    first = candidates[0]
    times: dict[KernelConfig, list[float]] = {config: [] for config in candidates}
    out: list[KernelConfig] = []
    for turn in range(budget.rounds):
        alive = [config for config in candidates if config not in out]
        for config in alive if turn % 2 == 0 else reversed(alive):
            times[config].append(sample(config))
        out += _given_up(alive, times, first, turn + 1)
    best = min((config for config in candidates if config not in out), key=lambda c: Timing(tuple(times[c])).median)
    if best == first:
        seconds = Timing(tuple(times[first])).median
        return Race(first, seconds, seconds, tuple(out))
    ours, theirs = _final(best, first, sample, budget.final)
    if theirs.median - ours.median > max(ours.spread, theirs.spread):
        return Race(best, ours.median, theirs.median, tuple(out))
    return Race(first, theirs.median, theirs.median, tuple(out))


def hopeful(candidates: Sequence[KernelConfig], probe: Sample) -> list[KernelConfig]:
    """Those, and always the first, that a short run does not show to be far behind the best."""
    times = {config: min(probe(config), probe(config)) for config in candidates}
    limit = _HOPELESS * min(times.values())
    return [config for config in candidates if config == candidates[0] or times[config] <= limit]


def _given_up(
    alive: Sequence[KernelConfig], times: dict[KernelConfig, list[float]], first: KernelConfig, turns: int
) -> list[KernelConfig]:
    if turns == 1:
        limit = _HOPELESS * min(times[config][0] for config in alive)
    elif turns == _ROUNDS_TO_TELL:
        limit = _LOSING * min(statistics.median(times[config]) for config in alive)
    else:
        return []
    slow = [config for config in alive if config != first and min(times[config]) > limit]
    return sorted(slow, key=lambda config: -min(times[config]))


def _final(best: KernelConfig, first: KernelConfig, sample: Sample, rounds: int) -> tuple[Timing, Timing]:
    times: dict[KernelConfig, list[float]] = {best: [], first: []}
    for turn in range(rounds):
        for config in (best, first) if turn % 2 == 0 else (first, best):
            times[config].append(sample(config))
    return Timing(tuple(times[best])), Timing(tuple(times[first]))
