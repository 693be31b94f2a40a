"""Tuning with given times and answers: what is tried, what is believed, what is remembered."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.errors import NoRightAnswer, NothingToTune
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.tuning import Outcome, PlanCache, Progress, Tuner
from fxquant.tuning.measuring import Case
from tests.tuning.fakes import DEVICE, PROBLEM, A, B, C, D, FakeBench, FakeFacts, FakeSpace, tile

TIMES = {A: [4.0], B: [2.0], C: [3.0], D: [1.0]}


def tuner(folder: Path, bench: FakeBench | None, **changes: Any) -> Tuner:
    return Tuner(FakeSpace(), PlanCache(DEVICE, folder), bench, **changes)


def the_only(outcomes: Sequence[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


def test_the_fastest_is_kept(tmp_path: Path) -> None:
    outcome = the_only(tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM]))
    assert outcome.entry.config == D
    assert (outcome.entry.source, outcome.entry.effort, outcome.entry.gain) == ("tuned", "quick", 4.0)
    assert PlanCache(DEVICE, tmp_path).read() == {PROBLEM: outcome.entry}


def test_a_wrong_answer_is_rejected_although_fastest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fxquant"):
        outcome = the_only(tuner(tmp_path, FakeBench(TIMES, lies=[D])).tune([PROBLEM]))
    assert outcome.entry.config == B
    assert [(out.config, out.reason) for out in outcome.dropped] == [(D, "3 of 64 values are wrong")]
    assert "linear 16×64×128 int8/token × int8/channel -> float16: mm 128 gives a wrong answer" in caplog.text


def test_where_all_answers_are_wrong_an_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoRightAnswer, match=r"linear 16×64×128 .* no configuration gives the reference's answer"):
        tuner(tmp_path, FakeBench(TIMES, lies=[A, B, C, D])).tune([PROBLEM])
    assert PlanCache(DEVICE, tmp_path).read() == {}


def test_a_second_run_measures_nothing(tmp_path: Path) -> None:
    tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM])
    bench = FakeBench(TIMES)
    outcome = the_only(tuner(tmp_path, bench).tune([PROBLEM]))
    assert outcome.known
    assert (outcome.measured, bench.samples) == (0, [])


def test_problems_are_tuned_once_at_the_end_of_their_bucket(tmp_path: Path) -> None:
    problems = [PROBLEM.with_m(m) for m in (9, 12, 16, 17)]
    outcomes = tuner(tmp_path, FakeBench(TIMES)).tune(problems)
    assert [outcome.entry.problem.m for outcome in outcomes] == [16, 32]


def test_what_no_kernel_takes_is_left_out(tmp_path: Path) -> None:
    other = Problem("embedding", 16, 64, 128, "int8/channel", "", "float16")
    assert tuner(tmp_path, FakeBench(TIMES)).tune([other]) == []


def test_full_measures_again_what_was_quick_and_quick_is_content_with_full(tmp_path: Path) -> None:
    tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM])
    assert not the_only(tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM], "full")).known
    assert the_only(tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM], "full")).known
    outcome = the_only(tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM], "quick"))
    assert (outcome.known, outcome.entry.effort) == (True, "full")


def test_a_kernel_whose_source_changed_is_tuned_again(tmp_path: Path) -> None:
    tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM])
    changed = dataclasses.replace(tuner(tmp_path, FakeBench(TIMES)), space=FakeSpace(sources={"mm": "source-2"}))
    outcome = the_only(changed.tune([PROBLEM]))
    assert (outcome.known, outcome.entry.kernel_source) == (False, "source-2")


def model(seconds: dict[KernelConfig, float]) -> dict[str, Any]:
    facts = {config: FakeFacts(spills=int(config == B)) for config in seconds}
    return {
        "arch": ARCHS["sm90"],
        "facts_of": lambda problem, config, arch: facts[config],
        "seconds_of": lambda problem, config, arch, found: seconds[config],
    }


MANY = {tile(size): float(size) for size in range(1, 10)}


def test_quick_tries_the_heuristic_and_the_best_of_the_model_full_tries_all(tmp_path: Path) -> None:
    bench = FakeBench({config: [1.0] for config in MANY})
    space = FakeSpace(configs=(tile(9), *list(MANY)[:-1]))
    quick = dataclasses.replace(tuner(tmp_path, bench, **model(MANY)), space=space)
    assert the_only(quick.tune([PROBLEM])).measured == 5
    assert set(bench.samples) == {tile(9), tile(1), tile(2), tile(3), tile(4)}
    assert the_only(quick.tune([PROBLEM], "full")).measured == 9


def test_what_spills_is_never_run(tmp_path: Path) -> None:
    bench = FakeBench(TIMES)
    outcome = the_only(tuner(tmp_path, bench, **model({A: 1.0, B: 1.0, C: 1.0, D: 1.0})).tune([PROBLEM]))
    assert B not in bench.samples
    assert [out.config for out in outcome.dropped] == [B]


def test_without_the_device_the_model_chooses_and_says_so(tmp_path: Path) -> None:
    by_model = tuner(tmp_path, None, **model({A: 4.0, B: 1.0, C: 2.0, D: 3.0}))
    outcome = the_only(by_model.tune([PROBLEM]))
    assert (outcome.entry.config, outcome.entry.source, outcome.measured) == (C, "modelled", 0)
    assert outcome.entry.gain == 2.0
    assert the_only(by_model.tune([PROBLEM])).known


def test_more_effort_asks_the_model_about_more(tmp_path: Path) -> None:
    by_model = tuner(tmp_path, None, **model({A: 4.0, B: 1.0, C: 2.0, D: 3.0}))
    assert not the_only(by_model.tune([PROBLEM], "quick")).known
    assert not the_only(by_model.tune([PROBLEM], "full")).known
    assert the_only(by_model.tune([PROBLEM], "quick")).known


def test_what_the_model_does_not_know_it_never_prefers_but_it_is_measured(tmp_path: Path) -> None:
    library = KernelConfig("int_mm")
    seconds = {**MANY, library: math.inf}
    space = FakeSpace(configs=(*MANY, library), sources={"mm": "1", "int_mm": "2"})
    by_model = dataclasses.replace(tuner(tmp_path, None, **model(seconds)), space=space)
    assert the_only(by_model.tune([PROBLEM], "full")).entry.config == tile(1)
    bench = FakeBench({**{config: [2.0] for config in MANY}, library: [1.0]})
    measured = dataclasses.replace(tuner(tmp_path / "here", bench, **model(seconds)), space=space)
    assert the_only(measured.tune([PROBLEM], "quick")).entry.config == library
    nothing = dataclasses.replace(by_model, space=dataclasses.replace(space, configs=(library,)))
    with pytest.raises(NothingToTune, match="the model knows no configuration"):
        nothing.tune([PROBLEM.with_m(64)])


def test_a_problem_without_memory_for_it_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(FakeBench):
        def case(self, problem: Problem) -> Case:
            if problem.m == 64:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")
            return self

    with caplog.at_level(logging.WARNING, "fxquant"):
        outcomes = tuner(tmp_path, Full(TIMES)).tune([PROBLEM.with_m(64), PROBLEM])
    assert [outcome.entry.problem for outcome in outcomes] == [PROBLEM]
    assert "is not tuned: CUDA out of memory. Tried to allocate 2.00 GiB" in caplog.text


def test_each_problem_is_announced_and_reported(tmp_path: Path) -> None:
    seen: list[Progress] = []
    tuner(tmp_path, FakeBench(TIMES)).tune([PROBLEM, PROBLEM.with_m(64)], watch=seen.append)
    assert [(step.done, step.total, step.problem.m, step.outcome is None) for step in seen] == [
        (0, 2, 16, True),
        (1, 2, 16, False),
        (1, 2, 64, True),
        (2, 2, 64, False),
    ]


def test_a_cache_that_cannot_be_written_costs_only_the_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING, "fxquant"), pytest.warns(UserWarning, match="the tuned plans in"):
        outcome = the_only(tuner(tmp_path / "file", FakeBench(TIMES)).tune([PROBLEM]))
    assert outcome.entry.config == D
    assert "cannot be kept" in caplog.text
