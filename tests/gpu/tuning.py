"""Checks of tuning on a device: it measures, remembers, and what it found is looked up."""

from __future__ import annotations

from pathlib import Path

from fxquant.target import Problem, Target
from fxquant.tuning import lookup, tune_problems


def check_tuning(problems: list[Problem], target: Target, folder: Path) -> None:
    """Each problem is measured once, its plan is marked as tuned, and a second run measures nothing."""
    first = tune_problems(problems, target, "quick", folder=folder)
    assert len(first.outcomes) == len(problems)
    for outcome in first.outcomes:
        assert outcome.measured > 0
        assert outcome.entry.source == "tuned"
        assert not [out for out in outcome.dropped if "wrong" in out.reason]
    assert all(outcome.known for outcome in tune_problems(problems, target, "quick", folder=folder).outcomes)
    for problem in problems:
        row = lookup(problem, target, folder).row(problem.m)
        assert row.source == "tuned"
