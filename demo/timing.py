"""Timing two or more functions fairly: they take turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each turn of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the middle half (interquartile range), in seconds: how much the machine moved meanwhile."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def alternate(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    advance: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the functions in turn, A B A B …, `rounds` times each; the first `warmup` rounds are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            start = clock()
            function()
            seconds = clock() - start
            if turn >= warmup:
                taken[name].append(seconds)
        advance()
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}
