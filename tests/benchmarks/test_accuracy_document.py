"""The accuracy page: made from results, and the committed one from the committed results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.text import Text

from benchmarks.accuracy import document, plot, recipes, references
from benchmarks.accuracy.measure import Row, Size
from benchmarks.accuracy.results import FOLDER, NoResults, Results, load, read, save
from benchmarks.accuracy.subject import Metric
from fxquant.spec import PRESETS

DOCS = Path(__file__).parents[2] / "docs"


def results(**changed: object) -> Results:
    rows = (
        Row(recipes.FLOAT, "float", scores={"psnr": math.inf, "sqnr": math.inf}, size=Size(0, 0, 10_000_000)),
        Row(
            "int8wo",
            "integer weights",
            spec="w=int8/channel",
            scores={"psnr": 60.94, "sqnr": 44.4},
            size=Size(8_000_000, 2_100_000, 10_000_000),
            kernels={"int8_linear_weight_only": 7},
            worst=("blocks.3.ff", 31.26),
            seconds={"float": 0.03, "quantized": 0.02},
        ),
        Row("int4wo", "integer weights", error="UnknownFormat: no | such\nformat"),
    )
    fields: dict[str, object] = {
        "name": "dit",
        "title": "A transformer",
        "source": "20 samples",
        "timed_as": "one step",
        "metrics": (Metric("psnr", "PSNR dB", 1), Metric("sqnr", "SQNR dB", 1)),
        "rows": rows,
        "plain": {"int8 per channel": {"psnr": 60.96, "sqnr": 44.4}},
        "machine": {"processor": "a CPU", "cores": 2, "torch": "2.13.0"},
        "threads": 2,
        "executor": "eager",
        "date": "2026-11-22",
        "seconds": 300.0,
        "quick": False,
    }
    return Results(**{**fields, **changed})  # pyright: ignore[reportArgumentType]


def test_a_section_says_what_was_measured() -> None:
    text = document.section(results())
    assert text.startswith("## A transformer\n\n20 samples. Speed: one step, float and quantized both in eager")
    assert "| `float32` | – | – | 10.0 | – | – | – | – |" in text
    assert "| `int8wo` | 2.10 | 26.2% | 4.1 | 60.9 | 44.4 | 1.50x | `blocks.3.ff` (31.3) |" in text
    assert "| `int4wo` | – | – | – | – | – | – | UnknownFormat: no / such |" in text
    assert "| int8 per channel (`int8wo`) | PSNR dB | 61 | 61.0 | 60.9 | as expected |" in text
    assert "int4 g32" not in text


@pytest.mark.parametrize(
    ("got", "plain", "words"),
    [
        (60.6, 60.0, "as expected"),
        (62.0, 60.0, "better"),
        (59.8, 60.0, "less, as plain rounding here"),
        (58.0, 60.0, "**less**"),
        (58.0, None, "**less**"),
    ],
)
def test_the_verdict_names_what_is_met(got: float, plain: float | None, words: str) -> None:
    assert document.verdict(Metric("psnr", "PSNR dB", 1), got, 61.0, plain) == words


def test_of_a_divergence_less_is_better() -> None:
    divergence = Metric("kl", "KL", 4, is_less_better=True)
    words = [document.verdict(divergence, got, 0.3, 0.31) for got in (0.29, 0.3, 0.31, 0.32)]
    assert words == ["better", "as expected", "more, as plain rounding here", "**more**"]


def test_a_score_is_expected_to_fall_as_far_below_float_as_it_did_then() -> None:
    float_row = Row(recipes.FLOAT, "float", scores={"mrr": 0.327})
    assert document.shift(results(name="minilm", rows=(float_row,)), "mrr") == pytest.approx(-0.01)
    assert document.shift(results(), "psnr") == 0


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = save(results(), tmp_path)
    assert read(path) == results()
    with pytest.raises(NoResults, match="`make accuracy` writes it"):
        load(tmp_path)


def test_the_plot_labels_every_point_and_is_the_same_twice(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    plot.save([results()], first)
    plot.save([results()], second)
    text = first.read_text()
    assert text == second.read_text()
    assert ">int8wo<" in text
    assert ">int4wo<" not in text  # it has no figure
    assert [row.recipe for row, *_ in plot.points(results())] == ["int8wo"]


def test_labels_do_not_cover_each_other() -> None:
    near = [
        Row(f"recipe {i}", "integer weights", scores={"psnr": 40 + i / 50}, size=Size(8_000_000, 2_000_000 + i, 1))
        for i in range(8)
    ]
    far = Row("far", "algorithm", scores={"psnr": 60.0}, size=Size(8_000_000, 4_000_000, 1))
    axis = plot.picture([results(rows=(*near, far))]).axes[0]
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_every_preset_and_every_reference_is_a_row() -> None:
    names = [recipe.name for recipe in recipes.all_recipes()]
    assert len(set(names)) == len(names)
    assert set(PRESETS) <= set(names)
    assert {reference.recipe for reference in references.REFERENCES} <= {recipes.FLOAT, *names}
    assert {recipe.family for recipe in recipes.all_recipes()} <= set(plot.STYLES)
    used = {key for r in references.REFERENCES for figures in r.figures.values() for key in figures}
    assert used == set(references.SLACK)


@pytest.mark.parametrize("name", [one.name for one in load(FOLDER)])
def test_the_committed_results_have_every_preset_with_its_figures(name: str) -> None:
    found = read(FOLDER / f"{name}.json")
    assert not found.quick
    rows = {row.recipe: row for row in found.rows}
    assert set(PRESETS) <= set(rows)
    for preset in PRESETS:
        assert rows[preset].error == ""
        # Convolutions may have other activations than linears; the weights are those of the preset everywhere.
        assert {spec.split()[0] for spec in rows[preset].spec.split(", ")} == {f"w={PRESETS[preset].weights}"}
        assert math.isfinite(rows[preset].scores["sqnr"])


def test_the_committed_page_and_plot_are_those_of_the_committed_results(tmp_path: Path) -> None:
    found = load(FOLDER)
    assert document.tables(found) in (DOCS / document.PAGE).read_text()
    drawn = (DOCS / document.PICTURE).read_text()
    for one in found:
        assert one.title in drawn
        for row, *_ in plot.points(one):
            assert f">{row.recipe}<" in drawn
