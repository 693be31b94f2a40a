"""Quality against size: one panel a model, every recipe a labelled point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from benchmarks.accuracy.measure import Row
from benchmarks.accuracy.recipes import FLOAT
from benchmarks.accuracy.results import Results

# Colours that stay apart for the colour-blind (Okabe and Ito, "Color Universal Design", 2008), and one marker each.
STYLES = {
    "integer weights": ("#0072B2", "o"),
    "integer weights and activations": ("#56B4E9", "s"),
    "float weights": ("#D55E00", "^"),
    "float weights and activations": ("#E69F00", "v"),
    "other round-to-nearest": ("#999999", "D"),
    "algorithm": ("#009E73", "P"),
    "embeddings": ("#CC79A7", "X"),
    "output layer too": ("#000000", "*"),
}
# Where a label may stand, in points from its mark: beside it first, then ever farther above and below.
PLACES = tuple(
    (side * x, y)
    for y in (0, 10, -10, 20, -20, 30, -30, 40, -40, 50, -50, 60, -60, 70, -70)
    for x, side in ((7, 1), (7, -1), (22, 1), (22, -1))
)


def save(results: list[Results], path: Path) -> None:
    """Write the figure, the same bytes for the same results."""
    with matplotlib.rc_context({"svg.hashsalt": "fxquant", "svg.fonttype": "none", "font.size": 9}):
        picture(results).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def picture(results: list[Results]) -> Figure:
    """One panel under the other."""
    figure = Figure(figsize=(10, 5.2 * len(results)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axis, one in zip(axes, results, strict=True):
        panel(axis, one)
    figure.draw_without_rendering()
    for axis, one in zip(axes, results, strict=True):
        label(axis, list(points(one)))
    return figure


def points(results: Results) -> Iterator[tuple[Row, float, float]]:
    """(row, MB of quantized weights, the model's first metric) of every row that has both."""
    key = results.metrics[0].key
    for row in results.rows:
        if row.size is not None and row.size.before and math.isfinite(row.scores[key]):
            yield row, row.size.after / 1e6, row.scores[key]


def panel(axis: Axes, results: Results) -> None:
    """Marks, axes and the line of float; labels come when the layout is fixed."""
    metric = results.metrics[0]
    for family, (colour, marker) in STYLES.items():
        found = [(x, y) for row, x, y in points(results) if row.family == family]
        if found:
            axis.scatter(*zip(*found, strict=True), color=colour, marker=marker, s=34, label=family, zorder=3)
    baseline = results.row(FLOAT)
    if baseline is not None and math.isfinite(level := baseline.scores[metric.key]):
        axis.axhline(level, color="black", linewidth=0.8, linestyle="--", label="float32", zorder=1)
    axis.set_title(results.title, loc="left", fontsize=11)
    axis.set_xlabel("quantized weights with their scales, MB")
    axis.set_ylabel(metric.heading)
    if metric.is_less_better:
        axis.set_yscale("log")
        axis.invert_yaxis()
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.margins(x=0.12, y=0.12)
    axis.legend(loc="lower right", fontsize=8, framealpha=0.9)


def label(axis: Axes, marks: list[tuple[Row, float, float]]) -> None:
    """Name every mark where its name covers neither a mark nor another name."""
    taken = [_around(*axis.transData.transform((x, y))) for _, x, y in marks]
    legend = axis.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    inside = axis.get_window_extent()
    for row, x, y in sorted(marks, key=lambda mark: (mark[1], mark[2])):
        colour = STYLES.get(row.family, ("black", "o"))[0]
        for dx, dy in PLACES:
            text = axis.annotate(
                row.recipe,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                va="center",
                fontsize=7.5,
                color="#222222",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
            )
            text.get_window_extent()  # places the words; what it returns takes in the line to the mark
            box = Text.get_window_extent(text)
            if _fits(box, inside) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            axis.annotate(row.recipe, (x, y), (7, 0), textcoords="offset points", va="center", fontsize=7.5)


def _around(x: float, y: float, reach: float = 4.0) -> Bbox:
    return Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach)


def _fits(box: Bbox, inside: Bbox) -> bool:
    return inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
