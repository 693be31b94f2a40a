"""Whole models in fxquant and in every tool a user would pick instead: time, error and memory of each.

A process a model: there all tools take turns, on one thread, then on two. Results: peers.models.json and .png; page.py
makes the tables.
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

LIMIT = 480  # seconds a process


def run(subject: str, threads: Sequence[int], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What one.py found, an entry for each number of threads that it came to, and in words why there is no more."""
    with tempfile.TemporaryDirectory(prefix="fxquant-peers-") as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.one", "--subject", subject]
        command += ["--threads", *map(str, threads), "--seconds", str(seconds), "--json", str(path)]
        try:
            done = subprocess.run(command, timeout=LIMIT, stdout=subprocess.DEVNULL)
            why = f"its process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"not done after {LIMIT} s"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else [], why


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
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for subject in chosen.subjects:
        threads = [n for n in ((1,) if chosen.quick else (1, 2)) if choice.tools(subject, n)]
        spent = time.perf_counter() - outcome.started
        if spent > 60 * chosen.minutes:
            found, why = [], f"not measured: {chosen.minutes:g} minutes were up"
        else:
            found, why = run(subject, threads, 3.0 if chosen.quick else chosen.seconds)
            taken = time.perf_counter() - outcome.started - spent
            progress(f"{subject}, {threads} thread(s): {taken:.0f} s, load {os.getloadavg()[0]:.1f}")
        for one in found:
            results[subject, one["threads"]] = one
            rows(outcome, one)
        for missing in threads[len(found) :]:
            progress(f"{subject}, {missing} thread(s): {why}")
            outcome.demand(f"{subject}, {missing} thread(s)", False, why, "a result")
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
    parser.add_argument("--minutes", type=float, default=15.0, help="no model is begun later than this")
    sys.exit(main(parser.parse_args()))
