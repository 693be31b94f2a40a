"""Histograms of what a calibration saw, with the ranges that were chosen."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from fxquant.calibration.stats import CalibrationStats, ModuleStats, TensorStats
from fxquant.errors import InvalidOption, NothingRecorded, PackageMissing, PatternMatchesNothing
from fxquant.spec.rules import matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
ROWS = 150  # a picture has no more: a bitmap may be 65536 dots high
ACROSS = 2  # modules in a row, once there are more than a few
INCHES = (3.6, 1.7)  # of one histogram
STEPS = 256  # drawn of a histogram's bins, at most


def draw(stats: CalibrationStats, path: Path, include: str | Sequence[str] | None) -> None:
    """Write the picture; see `Calibration.plot`."""
    kind = path.suffix[1:].lower()
    if kind not in FORMATS:
        raise InvalidOption("path", str(path), f"it takes a file name that ends in .{', .'.join(FORMATS)}")
    modules = _selected(stats, include)
    try:
        import matplotlib
    except ImportError:
        raise PackageMissing("matplotlib", "Calibration.plot") from None
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fxquant", "font.size": 8}):
        picture(modules).savefig(content, format=kind, dpi=100, metadata={"Date": None} if kind == "svg" else None)
    _write(path, content.getvalue())


def picture(modules: Sequence[ModuleStats]) -> Figure:
    """A row of inputs and outputs for each module, two modules beside each other if there are more than four."""
    from matplotlib.figure import Figure

    across = ACROSS if len(modules) > 2 * ACROSS else 1
    left_out = max(0, len(modules) - ROWS * across)
    modules = modules[: ROWS * across]
    rows = -(-len(modules) // across)
    size = (INCHES[0] * 2 * across, INCHES[1] * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, 2 * across, squeeze=False).reshape(-1, 2)
    for (left, right), module in zip(axes[: len(modules)], modules, strict=True):
        _panel(left, f"{module.path}: input", module.input)
        _panel(right, f"{module.path}: output", module.output)
    for axis in axes[len(modules) :].flat:
        axis.set_axis_off()
    if left_out:
        figure.suptitle(f"{left_out} more modules are not shown: choose with include=")
    return figure


def _selected(stats: CalibrationStats, include: str | Sequence[str] | None) -> list[ModuleStats]:
    if not stats:
        raise NothingRecorded()
    patterns = ["*"] if include is None else [include] if isinstance(include, str) else list(include)
    paths = list(stats)
    if dead := [pattern for pattern in patterns if not any(matches(pattern, path) for path in paths)]:
        raise PatternMatchesNothing(dead, paths)
    return [stats[path] for path in paths if any(matches(pattern, path) for pattern in patterns)]


def _panel(axis: Axes, title: str, side: TensorStats | None) -> None:
    """Counts on a logarithmic scale, as far as there are values; dashed lines at both ends of the range."""
    axis.set_title(title, loc="left", parse_math=False)
    if side is None:
        axis.set_axis_off()
        return
    axis.stairs(*_bars(side), fill=True, color="#56B4E9")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    for end in (-side.range, side.range):
        axis.axvline(end, color="#D55E00", linestyle="--", linewidth=1)
    axis.set_xlabel(f"{side.min:.4g} to {side.max:.4g}, range {side.range:.4g}", parse_math=False)


def _bars(side: TensorStats) -> tuple[list[int], list[float]]:
    """Counts, and one bound more, of the bins from -absmax to absmax, joined to at most `STEPS`."""
    middle = len(side.counts) // 2
    width = float(side.edges[middle + 1])
    reach = min(middle, int(side.absmax / width) + 1)
    joined = -(-2 * reach // STEPS)
    reach = min(middle, -(-reach // joined) * joined)
    starts = range(middle - reach, middle + reach, joined)
    counts = [int(side.counts[start : start + joined].sum()) for start in starts]
    return counts, side.edges[middle - reach : middle + reach + 1 : joined].tolist()


def _write(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part. Raises OSError."""
    with NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
        try:
            temporary.write(content)
            temporary.close()
            os.chmod(temporary.name, 0o644)
            os.replace(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise
