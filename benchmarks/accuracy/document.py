"""docs/accuracy.md and docs/accuracy.svg, made from the results.

python -m benchmarks.accuracy.document [--results FOLDER] [--write docs]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.accuracy.measure import Row
from benchmarks.accuracy.recipes import FLOAT
from benchmarks.accuracy.references import ORIGIN, REFERENCES, SLACK, Reference
from benchmarks.accuracy.results import FOLDER, Results, load
from benchmarks.accuracy.subject import Metric
from benchmarks.table import markdown
from demo.view import put_between

PAGE, PICTURE = "accuracy.md", "accuracy.svg"
MARK = "accuracy"
NONE = "–"


def section(results: Results) -> str:
    """One model: the table of all rows, then the founders' figures beside."""
    parts = [f"## {results.title}", facts(results), main_table(results)]
    if reference := reference_table(results):
        parts += [f"Round to nearest, beside what was {ORIGIN}:", reference]
    return "\n\n".join(parts)


def facts(results: Results) -> str:
    machine = results.machine
    runs = "in eager" if results.executor == "eager" else "compiled by Inductor"
    quick = " **A quick run: little data.**" if results.quick else ""
    return (
        f"{results.source}. Speed: {results.timed_as}, float and quantized both {runs}, in turns, medians, "
        f"{results.threads} threads. {results.date}, {results.seconds / 60:.0f} min; {machine['processor']}, "
        f"{machine['cores']} cores, torch {machine['torch']}.{quick}"
    )


def main_table(results: Results) -> str:
    headings = ["recipe", "weights MB", "of float", "model MB", *(m.heading for m in results.metrics)]
    rows = [cells(row, results.metrics) for row in results.rows]
    return markdown([*headings, "speed", "worst site (dB)"], rows)


def cells(row: Row, metrics: tuple[Metric, ...]) -> list[str]:
    """One line of the table."""
    if row.error:
        return [f"`{row.recipe}`", *[NONE] * (len(metrics) + 4), row.error.splitlines()[0].replace("|", "/")]
    size = row.size
    share = f"{size.after / size.before:.1%}" if size is not None and size.before else NONE
    weights = f"{size.after / 1e6:.2f}" if size is not None and size.before else NONE
    whole = f"{size.model_after / 1e6:.1f}" if size is not None else NONE
    speed = NONE if row.speed is None else f"{row.speed:.2f}x"
    worst = NONE if row.worst is None else f"`{row.worst[0]}` ({row.worst[1]:.1f})"
    return [f"`{row.recipe}`", weights, share, whole, *(figure(row, metric) for metric in metrics), speed, worst]


def figure(row: Row, metric: Metric) -> str:
    """A score in its digits; what float has against itself is left out."""
    value = row.scores[metric.key]
    return NONE if math.isinf(value) and row.recipe == FLOAT else f"{value:.{metric.digits}f}"


def reference_table(results: Results) -> str:
    """The schemes that the founders measured on this model; empty if none of their rows was run."""
    rows = [line for reference in REFERENCES for line in reference_lines(results, reference)]
    return markdown(["scheme", "metric", "expected", "plain rounding here", "fxquant", ""], rows) if rows else ""


def reference_lines(results: Results, reference: Reference) -> Iterator[list[str]]:
    """One line for each figure of the scheme: expected, by plain rounding, by fxquant, and whether it is met."""
    row = results.row(reference.recipe)
    if row is None or row.error:
        return
    for metric in results.metrics:
        expected = reference.figures.get(results.name, {}).get(metric.key)
        if expected is None:
            continue
        got, plain = row.scores[metric.key], results.plain.get(reference.scheme, {}).get(metric.key)
        yield [
            f"{reference.scheme} (`{reference.recipe}`)",
            metric.heading,
            f"{expected:g}",
            NONE if plain is None else f"{plain:.{metric.digits}f}",
            f"{got:.{metric.digits}f}",
            verdict(metric, got, expected + shift(results, metric.key), plain),
        ]


def shift(results: Results, key: str) -> float:
    """How much higher float scores here than it did for the founders: the tasks' data differ."""
    float_reference, row = REFERENCES[0].figures.get(results.name, {}), results.row(FLOAT)
    return row.scores[key] - float_reference[key] if row is not None and key in float_reference else 0.0


def verdict(metric: Metric, got: float, expected: float, plain: float | None) -> str:
    """Whether a figure is what was expected; if it is worse, whether plain rounding gives just that here."""
    sign, slack, worse = (-1, SLACK[metric.key], "more") if metric.is_less_better else (1, SLACK[metric.key], "less")
    got, expected = sign * got, sign * expected
    if got >= expected - slack:
        return "as expected" if got <= expected + slack else "better"
    if plain is not None and got >= sign * plain - slack:
        return f"{worse}, as plain rounding here"
    return f"**{worse}**"


def tables(results: list[Results]) -> str:
    """What stands between the page's marks."""
    return "\n\n".join(map(section, results)) + "\n"


def write(results: Path, docs: Path) -> None:
    """Renew the page and the plot from the JSON files."""
    from benchmarks.accuracy import plot  # it needs matplotlib, which tables do not

    found = load(results)
    page = docs / PAGE
    page.write_text(put_between(page.read_text(encoding="utf-8"), MARK, tables(found)), encoding="utf-8")
    plot.save(found, docs / PICTURE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON files")
    parser.add_argument("--write", type=Path, help="a folder whose accuracy.md and accuracy.svg to renew")
    options = parser.parse_args()
    if options.write is None:
        sys.stdout.write(tables(load(options.results)))
    else:
        write(options.results, options.write)
