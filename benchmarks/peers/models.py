"""Whole models in fxquant and in every tool a user would pick instead: time, error and memory of each.

A process a model: there all tools take turns. Results: peers.models.json, .png and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Outcome, arguments, finish, milliseconds, progress
from benchmarks.peers import demands, plots
from benchmarks.peers.ours import FLOAT
from benchmarks.peers.subjects import SUBJECTS
from benchmarks.peers.versions import versions
from benchmarks.table import section

LIMIT = 900  # seconds a process
# On two threads the tools take part that come near: the others only cost time.
NEAR = (
    FLOAT,
    "fxquant int8dq",
    "fxquant int4dq",
    "fxquant int4wo",
    "OpenVINO w8a8",
    "OpenVINO 8-bit weights",
    "ONNX Runtime int8",
    "torchao int8dq",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
)
TWO_THREADS = ("decoder-1", "decoder-128", "decoder-1024", "minilm", "smollm2-step", "smollm2-prefill")


def run(subject: str, threads: int, seconds: float) -> dict[str, Any] | None:
    """What one.py found; none if its process died, which is said on standard error."""
    with tempfile.TemporaryDirectory(prefix="fxquant-peers-") as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.one", "--subject", subject]
        command += ["--threads", str(threads), "--seconds", str(seconds), "--json", str(path)]
        command += ["--tools", *NEAR] if threads > 1 else []
        try:
            done = subprocess.run(command, timeout=LIMIT, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            progress(f"{subject}: not done after {LIMIT} s")
            return None
        if not path.exists():
            progress(f"{subject}: its process ended with {done.returncode}")
            return None
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
    jobs = [(subject, 1) for subject in chosen.subjects]
    jobs += [(s, 2) for s in chosen.subjects if s in TWO_THREADS and not chosen.quick]
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for subject, threads in jobs:
        found = run(subject, threads, 3.0 if chosen.quick else chosen.seconds)
        if found is None:
            outcome.demand(f"{subject}, {threads} thread(s)", False, "no result", "a result")
            continue
        results[subject, threads] = found
        rows(outcome, found)
    demands.check(outcome, results)
    for line in demands.skipped(results):
        sys.stdout.write(line + "\n")
    status = finish(outcome, chosen)
    if results:
        plots.models(list(results.values()), chosen.results / "peers.models.png")
        data = json.loads((chosen.results / "peers.models.json").read_text(encoding="utf-8"))
        text = f"{section(data)}\n\nVersions: {versions()}.\n\n" + "\n".join(f"- {x}" for x in demands.skipped(results))
        (chosen.results / "peers.models.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=12.0, help="timing per model")
    sys.exit(main(parser.parse_args()))
