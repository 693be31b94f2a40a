"""The demo's rows, as table and as Markdown."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.timing import Stats
from demo.compare import Quality, Settings, Sizes, Speed
from demo.view import as_markdown, processor, put_between, result_rows

SPEED = Speed(32, {"float": Stats(0.25, 0.2, 0.3, 7), "quantized": Stats(0.1, 0.1, 0.1, 7)})
SIZES = Sizes((4_000_000, 1_000_000), (9_000_000, 6_000_000), {"k": 36}, 36)
QUALITY = Quality(1000, 0.33, 0.327, 0.5, 0.495, 0.99664, 0.0019)


def test_rows_say_what_was_measured() -> None:
    assert list(result_rows([SPEED], SIZES, QUALITY)) == [
        ("latency, batch 32", "250.00 ms", "100.00 ms", "2.50x as fast"),
        ("weights, quantized layers", "4.0 MB", "1.0 MB", "4.00x smaller"),
        ("weights, whole model", "9.0 MB", "6.0 MB", "1.50x smaller"),
        ("retrieval, MRR", "0.3300", "0.3270", "-0.0030 ± 0.0019"),
        ("retrieval, recall at 10", "50.0%", "49.5%", "-0.5 points"),
        ("cosine to float", "1", "0.99664", ""),
    ]


def test_without_sizes_their_rows_are_left_out() -> None:
    assert next(row[0] for row in result_rows([], None, QUALITY)) == "retrieval, MRR"


def test_markdown_goes_between_its_marks_and_again() -> None:
    table = as_markdown(Settings(), result_rows([SPEED], SIZES, QUALITY))
    assert table.splitlines()[0] == "|  | float (Inductor) | int8dq | change |"
    text = "above\n<!-- results:begin -->\nold\n<!-- results:end -->\nbelow\n"
    once = put_between(text, "results", table)
    assert once == f"above\n<!-- results:begin -->\n{table}<!-- results:end -->\nbelow\n"
    assert put_between(once, "results", table) == once


def test_a_document_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="results:begin"):
        put_between("nothing here", "results", "table")


def test_the_processor_has_the_name_that_the_system_gives(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast: One\n")
    assert processor(tmp_path / "cpuinfo") == "A Fast: One"
    assert processor(tmp_path / "absent")
