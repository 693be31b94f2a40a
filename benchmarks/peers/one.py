"""One model, every tool in turns in this process; writes a JSON file for benchmarks.peers.models.

python -m benchmarks.peers.one --subject minilm --threads 1 2 --json FILE

One number of threads after the other: what does not depend on it, a model exported and calibrated, is made once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Error, progress
from benchmarks.peers import choice, exported, llama_cpp, torch_tools
from benchmarks.peers.absent import Absent
from benchmarks.peers.ours import FLOAT, OURS, plain
from benchmarks.peers.subjects import SUBJECTS, Subject
from benchmarks.timing import Stats

# Float first: everything else is held against it. Then ours, then the peers.
TOOLS: dict[str, Callable[[Subject, int], Callable[[], Tensor]]] = {
    FLOAT: plain,
    **OURS,
    **exported.TOOLS,
    **torch_tools.TOOLS,
    **llama_cpp.TOOLS,
}

SLOW, SLOW_TURNS = 0.4, 3  # seconds a call, and how many of those


class Memory:
    """The peak of resident memory above what was there before, in MB: what building and running a tool adds."""

    def __enter__(self) -> Memory:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before, self.peak = _resident("VmRSS"), 0.0
        return self

    def __exit__(self, *args: object) -> None:
        self.peak = _resident("VmHWM") - self.before


def _resident(name: str) -> float:
    (line,) = (
        one for one in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if one.startswith(name)
    )
    return int(line.split()[1]) / 1024


def build(
    name: str, subject: Subject, threads: int, want: Tensor
) -> tuple[dict[str, Any], Callable[[], Tensor] | None]:
    """What is known of a tool before it is timed, and its function; none if it cannot take this model."""
    started = time.perf_counter()
    try:
        with Memory() as memory:
            fn = TOOLS[name](subject, threads)
            subject.rewind()
            error = Error.of(fn(), want)
    except Absent as absent:
        return {"skipped": str(absent)}, None
    except Exception as failure:  # a peer's own failure is a result of the comparison, with its first words
        if name == FLOAT or name in OURS:
            raise
        words = (str(failure).strip() or "no words").splitlines()[0]
        return {"skipped": f"{type(failure).__name__}: {words[:160]}"}, None
    built = {"seconds": round(time.perf_counter() - started, 1), "error": error.relative, "cosine": error.cosine}
    return {**built, "peak_mb": round(memory.peak)}, fn


def turns(
    fns: dict[str, Callable[[], Tensor]], rewind: Callable[[], None], seconds: float, least: int
) -> dict[str, Stats]:
    """A B C A B C ...; a call below 50 ms comes behind an untimed one that brings its weights back into the caches.

    Who takes over 0.4 s has three turns: its spread is small beside its distance from the others.
    """
    taken: dict[str, list[float]] = {name: [] for name in fns}
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or rounds < least:
        rounds += 1
        for name, fn in fns.items():
            if rounds > SLOW_TURNS and min(taken[name]) > SLOW:
                continue
            if not taken[name] or taken[name][-1] < 0.05:
                rewind()
                fn()
            rewind()
            start = time.perf_counter()
            fn()
            taken[name].append(time.perf_counter() - start)
    return {name: _stats(times) for name, times in taken.items()}


def _stats(times: list[float]) -> Stats:
    ordered = sorted(times)
    return Stats(ordered[len(ordered) // 2], ordered[0], ordered[-1], len(ordered))


def measure(subject: Subject, threads: int, chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is found of each tool on that many threads, by name."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    subject.rewind()
    want = subject.model(*subject.inputs).clone()
    found: dict[str, dict[str, Any]] = {}
    fns: dict[str, Callable[[], Tensor]] = {}
    for name in chosen.tools or choice.tools(chosen.subject, threads):
        progress(f"{subject.name}, {threads} thread(s): {name}")
        found[name], fn = build(name, subject, threads, want)
        if fn is not None:
            fns[name] = fn
    for name, stats in turns(fns, subject.rewind, chosen.seconds, chosen.rounds).items():
        found[name] |= stats.as_json()
    return found


@torch.no_grad()
def main(chosen: argparse.Namespace) -> int:
    subject = SUBJECTS[chosen.subject]()
    results: list[dict[str, Any]] = []
    for threads in chosen.threads:
        found = measure(subject, threads, chosen)
        for name, first in (results[0]["tools"] if results else {}).items():
            if "peak_mb" in first and "peak_mb" in found.get(
                name, {}
            ):  # the first one also prepared: that is what a user would see
                found[name]["peak_mb"] = first["peak_mb"]
        results.append({"key": chosen.subject, "name": subject.name, "threads": threads, "tools": found})
        chosen.json.write_text(json.dumps(results), encoding="utf-8")  # now: the next may not come to its end
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=sorted(SUBJECTS), required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    sys.exit(main(parser.parse_args()))
