"""Pictures of the results: times of whole models, and the roofline of one linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers.ours import FLOAT

OURS, PEER, PLAIN = "#0b6e4f", "#9aa5b1", "#d1495b"


def color_of(tool: str) -> str:
    return PLAIN if tool == FLOAT else OURS if tool.startswith("fxquant") else PEER


def models(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a model: median times as bars, shortest on top, the relative error beside each."""
    columns = min(2, len(results))
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(8 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, found in zip(axes, results, strict=False):
        _bars(axis, found)
    for axis in axes[len(results) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)


def _bars(axis: Axes, found: Mapping[str, Any]) -> None:
    measured = {name: one for name, one in found["tools"].items() if "median" in one}
    order = sorted(measured, key=lambda name: -measured[name]["median"])
    times = [1e3 * measured[name]["median"] for name in order]
    bars = axis.barh(order, times, color=[color_of(name) for name in order])
    words = [f"{t:.3g} ms, error {measured[n]['error']:.3g}" for n, t in zip(order, times, strict=True)]
    axis.bar_label(bars, words, padding=3, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 2, max(times) * 12)
    axis.set_title(f"{found['name']}, {found['threads']} thread(s)", fontsize=10)
    axis.tick_params(labelsize=8)


@dataclass(frozen=True)
class Point:
    """A product on the roofline: `intensity` operations a byte of weights, `gops` 1e9 operations a second."""

    tool: str
    rows: int
    intensity: float
    gops: float


def roofline(points: Sequence[Point], bandwidth: float, peak: float, path: Path) -> None:
    """The measured roofs (bytes a second; operations a second) and the points under them."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axis = figure.subplots()
    left, right = 0.3, 4 * max(point.intensity for point in points)
    xs = [left, peak / bandwidth, right]
    axis.plot(xs, [min(x * bandwidth, peak) / 1e9 for x in xs], color="black", label="measured: read loop, dpbusd loop")
    markers = dict(zip(dict.fromkeys(point.tool for point in points), "o^sDvP*Xp<>h8", strict=False))
    for tool, marker in markers.items():
        mine = [point for point in points if point.tool == tool]
        axis.plot(
            [point.intensity for point in mine],
            [point.gops for point in mine],
            marker=marker,
            linestyle="-" if tool.startswith("fxquant") else "--",
            color=OURS if tool.startswith("fxquant") else PLAIN if tool.startswith("float") else None,
            linewidth=0.8,
            label=tool,
        )
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    axis.set_xlabel("operations a byte of weights (rows: 1 to 1024)")
    axis.set_ylabel("GOPS")
    axis.grid(visible=True, which="both", alpha=0.2)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
