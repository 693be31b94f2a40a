"""The tables of docs/benchmarks.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.harness import Outcome, finish


def results(folder: Path) -> Path:
    outcome = Outcome("some", "A title")
    outcome.add({"model": "m", "ms": "1.2"}, seconds=0.0012)
    outcome.at_least("fast", 1.0, 2.0)
    finish(outcome, argparse.Namespace(results=folder, quick=False))
    return folder


def test_the_page_gets_what_was_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nstale words\n{table.END}\nafter\n")
    table.write(page, table.tables(results(tmp_path)))
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n\n### A title\n")
    assert "| model | ms |\n| --- | --: |\n| m | 1.2 |" in text
    assert "| fast | 1.00x | >= 2x | **fails** |" in text
    assert "stale words" not in text
    assert text.endswith(f"{table.END}\nafter\n")


def test_a_page_without_a_place_for_results_is_an_error_that_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(table.NoMarkers, match=r"page\.md lacks the lines"):
        table.write(page, "text")


def test_no_results_say_what_makes_them(tmp_path: Path) -> None:
    assert table.tables(tmp_path) == "No results yet: `make bench` writes them."


def test_the_page_of_the_project_has_the_markers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert page.index(table.BEGIN) < page.index(table.END)
