"""The results as JSON: one file a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.measure import Row, Size
from benchmarks.accuracy.subject import Metric
from benchmarks.harness import RESULTS

FOLDER = RESULTS / "accuracy"
# The order of tables and panels.
SUBJECTS = ("minilm", "efficientnet", "dit", "smollm2")
OPTIONAL = ("smollm2",)


class NoResults(RuntimeError):
    """A folder lacks the file of a model."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is no {path}: `make accuracy` writes it")


@dataclass(frozen=True)
class Results:
    """All that was measured on one model. ``plain`` are the scores of plain round-to-nearest, by scheme."""

    name: str
    title: str
    source: str
    timed_as: str
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    plain: Mapping[str, Mapping[str, float]]
    machine: Mapping[str, str | int]
    threads: int
    executor: str
    date: str
    seconds: float
    quick: bool

    def row(self, recipe: str) -> Row | None:
        return next((row for row in self.rows if row.recipe == recipe), None)


def save(results: Results, folder: Path) -> Path:
    """Write ``<folder>/<model>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.name}.json"
    path.write_text(json.dumps(_encoded(asdict(results)), indent=1) + "\n", encoding="utf-8")
    return path


def load(folder: Path) -> list[Results]:
    """The results of every model, but for those that are not there everywhere. Raises `NoResults`."""
    paths = {name: folder / f"{name}.json" for name in SUBJECTS}
    return [read(path) for name, path in paths.items() if name not in OPTIONAL or path.exists()]


def read(path: Path) -> Results:
    """One file. Raises `NoResults`."""
    try:
        data = _decoded(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise NoResults(path) from error
    rows = tuple(_row(row) for row in data.pop("rows"))
    metrics = tuple(Metric(**metric) for metric in data.pop("metrics"))
    return Results(**data, rows=rows, metrics=metrics)


def _row(data: dict[str, Any]) -> Row:
    size, worst = data.pop("size"), data.pop("worst")
    return Row(**data, size=size and Size(**size), worst=worst and (worst[0], worst[1]))


def _encoded(value: Any) -> Any:
    """JSON has no inf and nan: they become text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
