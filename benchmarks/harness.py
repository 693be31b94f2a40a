"""What every benchmark script needs: arguments, checks, tables, and a JSON file of results with the machine's name."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import profiler_legacy

from demo.view import processor

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Check:
    """One demand. ``value`` is what was met, ``demand`` the limit in words, ``ok`` whether it holds."""

    what: str
    value: str
    demand: str
    ok: bool


@dataclass
class Outcome:
    """What one script found.

    ``rows`` is the printed table: a dict a row, the same keys in each. ``notes`` say what was left out, and why.
    """

    name: str
    title: str
    rows: list[dict[str, str]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, row: dict[str, str], **figures: Any) -> None:
        """One row of the table, and the same in full precision for other programs."""
        self.rows.append(row)
        self.figures.append(figures)

    def at_least(self, what: str, value: float, limit: float) -> None:
        """Demand value >= limit, of a ratio."""
        self.checks.append(Check(what, f"{value:.2f}x", f">= {limit:g}x", value >= limit))

    def at_most(self, what: str, value: float, limit: float, unit: str = "x") -> None:
        """Demand value <= limit; with unit "%" both are shares."""
        factor = 100 if unit == "%" else 1
        met, wanted = f"{factor * value:.2f}{unit}", f"<= {factor * limit:g}{unit}"
        self.checks.append(Check(what, met, wanted, value <= limit))

    def demand(self, what: str, ok: bool, value: str, demand: str) -> None:
        self.checks.append(Check(what, value, demand, ok))


class WrongAnswer(AssertionError):
    """A candidate does not compute what it is timed for; no time of it means anything."""

    def __init__(self, what: str, met: str, wanted: str) -> None:
        super().__init__(f"{what}: {met}, expected {wanted}. Nothing was timed.")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The parser with what all scripts take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: shows that it works")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser


def finish(outcome: Outcome, chosen: argparse.Namespace) -> int:
    """Print the table and the checks, write the JSON file; returns the exit status: 1 if a demand does not hold."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_table(outcome.title, outcome.rows))
    rows = [{"must hold": c.what, "measured": c.value, "demand": c.demand, "": _word(c)} for c in outcome.checks]
    if rows:
        console.print(_table("", rows))
    for note in outcome.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / f"{outcome.name}.json"
    path.write_text(json.dumps(_as_json(outcome, chosen), indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 0 if all(check.ok for check in outcome.checks) else 1


def progress(text: str) -> None:
    """A line on standard error, so that a long run shows where it is."""
    sys.stderr.write(f"... {text}\n")
    sys.stderr.flush()


def machine() -> dict[str, str | int]:
    """What the figures were taken on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def kernels_run(fn: Callable[[], object]) -> set[str]:
    """The names of the products that one call dispatches, by the profiler: ``fxquant::int8_linear``, ``aten::addmm``.

    Inductor's own C++ kernels are not dispatched and so are not seen.
    """
    marks = ("fxquant::", "mkl", "addmm", "::mm", "onednn")
    profile = profiler_legacy.profile()  # torch.profiler's Kineto writes lines of its own between ours
    with profile:
        fn()
    events = profile.function_events or ()
    return {event.name for event in events if any(mark in event.name for mark in marks)}


def judged_by(threads: int) -> Literal["median", "best"]:
    """Which statistic a demand is held against: medians, but of several threads the best rounds.

    Where a neighbour holds one of the cores, a barrier of two threads waits for a whole time slice. That strikes most
    rounds alike, whoever computes, and says nothing about the candidates.
    """
    return "median" if threads == 1 else "best"


@dataclass(frozen=True)
class Error:
    """How far a tensor is from the one it stands for: |got - want| / |want|, the same in dB, and the cosine."""

    relative: float
    sqnr: float
    cosine: float

    @staticmethod
    def of(got: Tensor, want: Tensor) -> Error:
        a, b = got.double().flatten(), want.double().flatten()
        noise, signal = (a - b).square().sum(), b.square().sum()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
        return Error(float((noise / signal).sqrt()), float(10 * torch.log10(signal / noise)), float(cosine))

    def as_row(self) -> dict[str, str]:
        return {"rel. error": f"{self.relative:.4f}", "SQNR dB": f"{self.sqnr:.1f}", "cosine": f"{self.cosine:.5f}"}


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _table(title: str, rows: Sequence[dict[str, str]]) -> Table:
    table = Table(title=title or None, title_justify="left")
    for index, heading in enumerate(rows[0] if rows else ()):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def _word(check: Check) -> str:
    return "ok" if check.ok else "FAILS"


def _as_json(outcome: Outcome, chosen: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "title": outcome.title,
        "command": shlex.join(["python", "-m", f"benchmarks.{outcome.name}", *sys.argv[1:]]),
        "quick": chosen.quick,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - outcome.started, 1),
        "rows": outcome.rows,
        "checks": [asdict(check) for check in outcome.checks],
        "notes": outcome.notes,
        "figures": outcome.figures,
    }
