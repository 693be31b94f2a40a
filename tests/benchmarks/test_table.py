"""The tables of docs/benchmarks.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import coverage, pipelines, table
from benchmarks.harness import Outcome, finish
from demo.view import put_between


def results(folder: Path) -> Path:
    outcome = Outcome("some", "A title")
    outcome.add({"model": "m", "ms": "1.2"}, seconds=0.0012)
    outcome.at_least("fast", 1.0, 2.0)
    finish(outcome, argparse.Namespace(results=folder, quick=False))
    return folder


def test_the_page_gets_what_was_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results:begin -->\nstale words\n<!-- results:end -->\nafter\n")
    table.write(page, table.MARK, table.tables(results(tmp_path)))
    text = page.read_text()
    assert text.startswith("before\n<!-- results:begin -->\n\n### A title\n")
    assert "| model | ms |\n| --- | --: |\n| m | 1.2 |" in text
    assert "| fast | 1.00x | >= 2x | **fails** |" in text
    assert "stale words" not in text
    assert text.endswith("\n\n<!-- results:end -->\nafter\n")


def test_a_page_without_a_place_for_results_is_an_error_that_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="results:begin"):
        table.write(page, table.MARK, "text")


def test_no_results_say_what_makes_them(tmp_path: Path) -> None:
    assert table.tables(tmp_path) == "No results yet: `make bench` writes them."


@pytest.mark.parametrize(
    ("page", "mark"), [("benchmarks", table.MARK), ("models", coverage.MARK), ("diffusers", pipelines.MARK)]
)
def test_the_pages_of_the_project_have_the_marks(page: str, mark: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text()
    assert "| new |" in put_between(text, mark, "| new |")
