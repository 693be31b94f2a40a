"""The harness: errors, demands, names of kernels, and what is written."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Error, Outcome, finish, judged_by, kernels_run


def test_error_of_a_known_pair() -> None:
    error = Error.of(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    assert error.relative == pytest.approx(math.sqrt(1 / 18))
    assert error.sqnr == pytest.approx(10 * math.log10(18))
    assert error.cosine == pytest.approx(21 / (5 * math.sqrt(18)))


def test_kernels_run_names_the_product_that_was_dispatched() -> None:
    x = torch.ones(2, 4)
    assert "aten::addmm" in kernels_run(lambda: F.linear(x, torch.ones(3, 4), torch.ones(3)))
    assert kernels_run(lambda: x + 1) == set()


def test_demands_are_held_against_their_limits() -> None:
    outcome = Outcome("name", "title")
    outcome.at_least("fast", 2.999, 3.0)
    outcome.at_most("cheap", 0.01, 0.01, "%")
    assert [(c.value, c.demand, c.ok) for c in outcome.checks] == [("3.00x", ">= 3x", False), ("1.00%", "<= 1%", True)]


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_finish_writes_the_figures_and_tells_what_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ok: bool, status: int
) -> None:
    outcome = Outcome("some", "A title")
    outcome.add({"model": "m", "ms": "1.2"}, seconds=0.00123)
    outcome.demand("it holds", ok, "this", "that")
    assert finish(outcome, argparse.Namespace(results=tmp_path, quick=True)) == status
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["figures"] == [{"seconds": 0.00123}]
    assert written["quick"] is True
    assert ("FAILS" in capsys.readouterr().out) is not ok


def test_several_threads_are_judged_by_their_best_round() -> None:
    assert (judged_by(1), judged_by(2)) == ("median", "best")
