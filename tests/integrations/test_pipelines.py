"""The table of docs/diffusers.md: a run on one pipeline, written into a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pipelines
from tests.integrations.marks import MARKS
from tests.integrations.small_pipelines import PIPELINES

diffusers: Any = pytest.importorskip("diffusers")
pytestmark = [*MARKS, pytest.mark.usefixtures("fresh_dynamo")]


def test_every_pipeline_has_a_title() -> None:
    assert tuple(pipelines.TITLES) == PIPELINES


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- pipelines:begin -->\nold\n<!-- pipelines:end -->\nbelow\n")
    chosen = argparse.Namespace(only=["sd"], quick=True, executor="eager", write=page, results=tmp_path)
    assert pipelines.main(chosen) == 0
    figures = json.loads((tmp_path / "pipelines.json").read_text())["figures"][0]["sqnr"]
    assert page.read_text() == (
        "above\n<!-- pipelines:begin -->\n\n"
        "|  | `int8wo` | `int8dq` |\n| --- | --: | --: |\n"
        f"| Stable Diffusion (UNet) | {figures['int8wo']:.1f} | {figures['int8dq']:.1f} |\n\n"
        "<!-- pipelines:end -->\nbelow\n"
    )


def test_a_demand_that_does_not_hold_fails() -> None:
    outcome = pipelines.Outcome("pipelines", "title")
    bad = pipelines.Pictured(sqnr=10.0, coverage=0.5, graphs={"unet": 2, "vae": 1})
    pipelines.judge(outcome, "SD", {"int8wo": bad})
    assert [check.ok for check in outcome.checks] == [False, False, False]
    pipelines.judge(outcome, "SD", {"int8wo": pipelines.Pictured(50.0, 1.0, {"unet": 1})})
    assert [check.ok for check in outcome.checks[3:]] == [True, True, True]
