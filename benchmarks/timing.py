"""Paired timing: the candidates take turns in one process, so that a noisy minute strikes all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Stats:
    """Seconds per call of one candidate. `rounds` is how many times it had its turn."""

    median: float
    best: float
    worst: float
    rounds: int

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


def paired(
    fns: Mapping[str, Callable[[], object]], *, seconds: float = 0.5, min_rounds: int = 7, max_rounds: int = 2000
) -> dict[str, Stats]:
    """Time the candidates in turns A, B, C, A, B, C, ... and give each one's statistics.

    Each turn calls its candidate as often as fills about 0.2 ms (one call, for most), after one untimed call that
    brings its own weights back into the cache: what is measured is the candidate called again and again. Rounds go on
    for about `seconds` in all, but at least `min_rounds`. The garbage collector rests meanwhile.
    """
    calls = {name: _calls_per_turn(fn) for name, fn in fns.items()}
    taken: dict[str, list[float]] = {name: [] for name in fns}
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        rounds = 0
        while rounds < max_rounds and (rounds < min_rounds or time.perf_counter() - started < seconds):
            for name, fn in fns.items():
                fn()
                taken[name].append(_time(fn, calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Stats(statistics.median(t), min(t), max(t), len(t)) for name, t in taken.items()}


def ratio(stats: Mapping[str, Stats], slow: str, fast: str, figure: Literal["median", "best"] = "median") -> float:
    """How many times as fast `fast` is as `slow`."""
    return getattr(stats[slow], figure) / getattr(stats[fast], figure)


def _calls_per_turn(fn: Callable[[], object], turn: float = 2e-4) -> int:
    for _ in range(2):  # the first call may build, pack or allocate
        fn()
    return max(1, min(200, round(turn / max(_time(fn, 1), 1e-7))))


def _time(fn: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - started) / calls
