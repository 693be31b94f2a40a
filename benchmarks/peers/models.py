"""Whole models in fxquant and in every tool a user would pick instead: time, error and memory of each.

A process a model: there all tools take turns. Results: peers.models.json and .png; page.py makes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Outcome, arguments, finish, milliseconds, progress
from benchmarks.peers import choice, demands, plots
from benchmarks.peers.ours import FLOAT
from benchmarks.peers.subjects import SUBJECTS
from benchmarks.peers.versions import versions

LIMIT = 300  # seconds a process


def run(subject: str, threads: int, tools: Sequence[str], seconds: float) -> dict[str, Any] | str:
    """What one.py found, or in words why there is nothing."""
    with tempfile.TemporaryDirectory(prefix="fxquant-peers-") as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.one", "--subject", subject]
        command += ["--threads", str(threads), "--seconds", str(seconds), "--json", str(path), "--tools", *tools]
        try:
            done = subprocess.run(command, timeout=LIMIT, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return f"not done after {LIMIT} s"
        if not path.exists():
            return f"its process ended with {done.returncode}"
        return json.loads(path.read_text(encoding="utf-8"))


def rows(outcome: Outcome, found: Mapping[str, Any]) -> None:
    base = found["tools"][FLOAT]
    for name, one in found["tools"].items():
        if "median" not in one:
            continue
        spread = f"{milliseconds(one['best'])} to {milliseconds(one['worst'])}"
        row = {"model": found["name"], "threads": str(found["threads"]), "tool": name}
        row |= {
            "ms": milliseconds(one["median"]),
            "spread": spread,
            "of float": f"{base['median'] / one['median']:.2f}",
        }
        row |= {"rel. error": f"{one['error']:.4f}", "peak MB added": str(one["peak_mb"])}
        outcome.add(row, model=found["key"], threads=found["threads"], tool=name, **one)


def main(chosen: argparse.Namespace) -> int:
    outcome = Outcome("peers.models", "Whole models beside other tools, in turns in one process a model")
    outcome.notes.extend(choice.NOTES)
    jobs = [(subject, 1, choice.TOOLS[subject]) for subject in chosen.subjects]
    if not chosen.quick:
        jobs += [(s, 2, choice.TWO_THREADS[s]) for s in chosen.subjects if s in choice.TWO_THREADS]
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for subject, threads, tools in jobs:
        spent = time.perf_counter() - outcome.started
        late = f"not measured: {chosen.minutes:g} minutes were up" if spent > 60 * chosen.minutes else ""
        found = late or run(subject, threads, tools, 3.0 if chosen.quick else chosen.seconds)
        if isinstance(found, str):
            progress(f"{subject}: {found}")
            outcome.demand(f"{subject}, {threads} thread(s)", False, found, "a result")
            continue
        taken = time.perf_counter() - outcome.started - spent
        progress(f"{subject}, {threads} thread(s): {taken:.0f} s, load {os.getloadavg()[0]:.1f}")
        results[subject, threads] = found
        rows(outcome, found)
    demands.check(outcome, results)
    outcome.notes.extend([*demands.skipped(results), f"versions: {versions()}"])
    status = finish(outcome, chosen)
    if results:
        plots.models(list(results.values()), chosen.results / "peers.models.png")
    return status


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=6.0, help="timing per model")
    parser.add_argument("--minutes", type=float, default=12.5, help="no model is begun later than this")
    sys.exit(main(parser.parse_args()))
