"""What must hold of whole models, read from the figures of one.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.harness import Outcome, judged_by
from benchmarks.peers.ours import FLOAT, OURS

Found = Mapping[str, Any]
INT8, INT8_FINE, INT4 = "fxquant int8dq", "fxquant int8wo, groups", ("fxquant int4dq", "fxquant int4wo")
# Times of float32 Inductor, by model: int8dq in both granularities, and the better of the 4-bit recipes.
FLOORS_INT8 = {
    "decoder-1": 3.0,
    "decoder-128": 3.0,
    "decoder-1024": 2.4,
    "minilm": 1.9,
    "smollm2-step": 2.8,
    "smollm2-prefill": 2.2,
}
FLOORS_INT4 = {"decoder-1": 4.5, "smollm2-step": 3.5}
# Models where the best peer has to be beaten, and by how much.
BEST_PEER = {"decoder-1": 1.05, "decoder-128": 1.05, "decoder-1024": 1.05}
PEERS = ("OpenVINO", "ONNX Runtime", "torchao")
# Errors this near are equal: they move with the inputs.
SAME_ERROR = 1.05
# From here on an answer is worse than none, zeros: no result to be held against.
WRONG = 1.0


def check(outcome: Outcome, results: Mapping[tuple[str, int], Found]) -> None:
    """Every demand of the results there are; a tool that is missing leaves its demand out, with a line."""
    for (key, threads), found in results.items():
        figure = judged_by(threads)
        times = {name: one[figure] for name, one in found["tools"].items() if "median" in one}
        where = f"{found['name']}, {threads} thread(s)"
        four = min((name for name in INT4 if name in times), key=times.__getitem__, default="")
        for ours, floors in ((INT8, FLOORS_INT8), (INT8_FINE, FLOORS_INT8), (four, FLOORS_INT4)):
            if FLOAT in times and ours in times and key in floors:
                outcome.at_least(f"{where}: {_named(found, ours)}, of float", times[FLOAT] / times[ours], floors[key])
        if key in BEST_PEER:
            _beats_peers(outcome, where, found, times, BEST_PEER[key])
        if key.startswith("smollm2"):
            _beats_llama_cpp(outcome, where, found, times, four)


def _named(found: Found, name: str) -> str:
    return f"{name} (error {found['tools'][name]['error']:.3g})"


def _beats_peers(outcome: Outcome, where: str, found: Found, times: Mapping[str, float], floor: float) -> None:
    """Each peer against the quickest of our recipes whose error is at most the peer's."""
    tools = found["tools"]
    ours = [name for name in OURS if name in times]
    for peer in (name for group in PEERS for name in times if name.startswith(group)):
        if not tools[peer]["error"] < WRONG:
            outcome.notes.append(f"{where}: {_named(found, peer)} is wrong by more than zeros would be: no result")
            continue
        good = [name for name in ours if tools[name]["error"] <= SAME_ERROR * tools[peer]["error"]]
        if good:
            best = min(good, key=times.__getitem__)
            what = f"{where}: {_named(found, best)}, of {_named(found, peer)}: our quickest of no more error"
            outcome.at_least(what, times[peer] / times[best], floor)
        elif ours:
            nearest = min(ours, key=lambda name: tools[name]["error"])
            met = f"none; {_named(found, nearest)}: {times[peer] / times[nearest]:.2f}x"
            what = f"{where}: a recipe of ours of no more error, of {_named(found, peer)}"
            outcome.demand(what, False, met, f">= {floor}x")


def _beats_llama_cpp(outcome: Outcome, where: str, found: Found, times: Mapping[str, float], four: str | None) -> None:
    """A step: 8 bits beside 8, 4 beside 4; prefill: 8 bits beside the quicker of the two."""
    q8, q4 = (f"llama.cpp {kind}" for kind in ("Q8_0", "Q4_0"))
    pairs, floor = [(INT8, q8), (INT8_FINE, q8), (four, q4)], 1.1
    if found["key"] != "smollm2-step":
        both = [name for name in (q8, q4) if name in times]
        best = min(both, key=times.__getitem__, default="")
        pairs, floor = [(INT8, best), (INT8_FINE, best)], 1.5
    for ours, peer in pairs:
        if ours in times and peer in times:
            what = f"{where}: {_named(found, ours)}, of {_named(found, peer)}"
            outcome.at_least(what, times[peer] / times[ours], floor)


def skipped(results: Mapping[tuple[str, int], Found]) -> Iterator[str]:
    """A line for every tool that was not measured, and why."""
    for found in results.values():
        for name, one in found["tools"].items():
            if "skipped" in one:
                yield f"skipped: {name}, {found['name']}, {found['threads']} thread(s): {one['skipped']}"
