"""TuneReport: what a tuning run came to, as data and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import NothingToTune
from fxquant.target import M_BUCKETS, Arch, Problem, Target
from fxquant.tuning.cpu import words_of
from fxquant.tuning.plans.records import Effort
from fxquant.tuning.tuner import Outcome, Watch, tuner_for, unwatched


@dataclass(frozen=True)
class TuneReport:
    """What `fxquant.tune` did.

    device    what it was tuned for, in words.  path: of the file that holds the plans.
    outcomes  one a problem.
    """

    device: str
    path: str
    outcomes: tuple[Outcome, ...]

    @property
    def measured(self) -> int:
        """How many configurations were timed; 0 where everything was known, and without the device."""
        return sum(outcome.measured for outcome in self.outcomes)

    @property
    def known(self) -> int:
        """How many problems were tuned before."""
        return sum(outcome.known for outcome in self.outcomes)

    def __str__(self) -> str:
        lines = [self.summary]
        for outcome in self.outcomes:
            entry = outcome.entry
            time = f"{microseconds(entry.seconds)}, {entry.gain:.2f} x the heuristic's"
            lines.append(f"  {entry.problem}: {words_of(entry.config)}, {time} ({entry.source})")
            lines += [f"    not {words_of(out.config)}: {out.reason}" for out in outcome.dropped]
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """One sentence."""
        new = len(self.outcomes) - self.known
        by_model = sum(outcome.entry.source == "modelled" for outcome in self.outcomes)
        how = f"{by_model} chosen by the model of time, none of these measured" if by_model else "all measured"
        better = sum(outcome.entry.gain > 1.005 for outcome in self.outcomes)
        return (
            f"{len(self.outcomes)} problems for {self.device}: {new} new, {self.known} known before; {how}; "
            f"{better} faster than the heuristic's configuration; kept in {self.path}"
        )

    def to_json(self) -> dict[str, Any]:
        fields = [{**dataclasses.asdict(outcome), "entry": outcome.entry.to_json()} for outcome in self.outcomes]
        return {"device": self.device, "path": self.path, "outcomes": fields}


def microseconds(seconds: float) -> str:
    """Such as '13.6 us'."""
    return f"{seconds * 1e6:.1f} us"


def tune_problems(
    problems: Sequence[Problem],
    target: Target | Arch | str,
    effort: Effort = "quick",
    watch: Watch = unwatched,
    folder: Path | None = None,
) -> TuneReport:
    """Tune problems for a target; see `fxquant.tune`. `folder` is the user's cache, for tests.

    m = 0 stands for all of `M_BUCKETS`. A product of codes for which the target has no kernel is one of floats there.
    Raises `NothingToTune`, `NoRightAnswer`, `InvalidOption`.
    """
    tuner = tuner_for(target, folder)
    asked = [p.with_m(m) for p in problems for m in ((p.m,) if p.m else M_BUCKETS)]
    taken = [p if tuner.space.candidates(p) else dataclasses.replace(p, activations="") for p in asked]
    outcomes = tuner.tune([p for p in taken if p.op != "quantize" or p.activations], effort, watch)
    if not outcomes:
        words = "; ".join(str(problem) for problem in problems[:4]) or "no quantized products were given"
        raise NothingToTune(tuner.cache.device, f"no kernel takes any of the problems, or no memory is left ({words})")
    return TuneReport(str(tuner.cache.device), str(tuner.cache.path), tuple(outcomes))
