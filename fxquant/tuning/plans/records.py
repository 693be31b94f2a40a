"""What tuning remembers: the configuration of one problem, where it comes from, and what it was compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fxquant.target import KernelConfig, Problem

Source = Literal["tuned", "modelled", "heuristic"]
Effort = Literal["none", "quick", "full"]
_EFFORTS: tuple[Effort, ...] = ("none", "quick", "full")


@dataclass(frozen=True)
class Entry:
    """The best known configuration of a problem whose m is one of `M_BUCKETS`.

    source            'tuned': measured on the device; 'modelled': chosen by the model of time, never run.
    kernel_source     `source_hash` of the kernel: with another source the entry does not count.
    seconds           of this configuration, measured or modelled; `heuristic_seconds` likewise of the heuristic's.
    effort            with which it was chosen: 'quick' or 'full'; 'none' in a shipped table.
    """

    problem: Problem
    config: KernelConfig
    source: Source
    kernel_source: str
    seconds: float
    heuristic_seconds: float
    effort: Effort = "none"

    @property
    def gain(self) -> float:
        """How many times faster than the heuristic's configuration."""
        return self.heuristic_seconds / self.seconds if self.seconds > 0 else 1.0

    def serves(self, effort: Effort, *, measured: bool) -> bool:
        """Nothing has to be done for somebody who asks for that effort, and whether it be measured."""
        enough = _EFFORTS.index(self.effort) >= _EFFORTS.index(effort)
        return enough and (self.source == "tuned" or not measured)

    def to_json(self) -> dict[str, Any]:
        return {
            "problem": self.problem.to_json(),
            "config": self.config.to_json(),
            "source": self.source,
            "effort": self.effort,
            "seconds": self.seconds,
            "heuristic_seconds": self.heuristic_seconds,
            "kernel_source": self.kernel_source,
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Entry:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError if it is none."""
        source, effort = fields["source"], fields["effort"]
        if source not in ("tuned", "modelled") or effort not in _EFFORTS:
            raise ValueError(f"source {source!r}, effort {effort!r}")
        return Entry(
            problem=Problem.from_json(dict(fields["problem"])),
            config=KernelConfig.from_json(fields["config"]),
            source=source,
            kernel_source=str(fields["kernel_source"]),
            seconds=float(fields["seconds"]),
            heuristic_seconds=float(fields["heuristic_seconds"]),
            effort=effort,
        )


Entries = Mapping[Problem, Entry]


def merged(*many: Iterable[Entry]) -> dict[Problem, Entry]:
    """One entry a problem: a later one replaces an earlier one, but what was not measured never what was."""
    kept: dict[Problem, Entry] = {}
    for entry in (entry for entries in many for entry in entries):
        known = kept.get(entry.problem)
        measured = known is not None and known.source == "tuned" and known.kernel_source == entry.kernel_source
        if not measured or entry.source == "tuned":
            kept[entry.problem] = entry
    return kept
