"""What must hold of whole models, read from the figures of one.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.harness import Outcome, judged_by
from benchmarks.peers.ours import FLOAT

Found = Mapping[str, Any]
INT8, INT4 = "fxquant int8dq", ("fxquant int4dq", "fxquant int4wo")
# Times of float32 Inductor, by model: int8dq, and the better of the 4-bit recipes.
FLOORS_INT8 = {
    "decoder-1": 3.0,
    "decoder-128": 3.0,
    "decoder-1024": 2.4,
    "minilm": 1.9,
    "smollm2-step": 2.8,
    "smollm2-prefill": 2.2,
}
FLOORS_INT4 = {"decoder-1": 4.5, "smollm2-step": 3.5}
# Models where the best peer of equal or less error has to be beaten, and by how much.
BEST_PEER = {"decoder-1": 1.05, "decoder-128": 1.05, "decoder-1024": 1.05}
PEERS = ("OpenVINO", "ONNX Runtime", "torchao")
# Errors this near are equal: they move with the inputs.
SAME_ERROR = 1.05


def check(outcome: Outcome, results: Mapping[tuple[str, int], Found]) -> None:
    """Every demand of the results there are; a tool that is missing leaves its demand out, with a line."""
    for (key, threads), found in results.items():
        figure = judged_by(threads)
        times = {name: one[figure] for name, one in found["tools"].items() if "median" in one}
        where = f"{found['name']}, {threads} thread(s)"
        if FLOAT in times and INT8 in times and key in FLOORS_INT8:
            outcome.at_least(f"{where}: int8dq, of float", times[FLOAT] / times[INT8], FLOORS_INT8[key])
        four = min((times[name] for name in INT4 if name in times), default=None)
        if four and FLOAT in times and key in FLOORS_INT4:
            outcome.at_least(f"{where}: int4, of float", times[FLOAT] / four, FLOORS_INT4[key])
        if key in BEST_PEER:
            _beats_peers(outcome, where, found, times, BEST_PEER[key])
        if key.startswith("smollm2"):
            _beats_llama_cpp(outcome, where, key, times, four)


def _beats_peers(outcome: Outcome, where: str, found: Found, times: Mapping[str, float], floor: float) -> None:
    """Held against every recipe of ours: the quickest of those whose error is no larger than the peer's."""
    tools = found["tools"]
    for group in PEERS:
        for peer in (name for name in times if name.startswith(group)):
            good = [
                times[name]
                for name in (INT8, *INT4)
                if name in times and tools[name]["error"] <= SAME_ERROR * tools[peer]["error"]
            ]
            what = f"{where}: at equal or less error, of {peer}"
            if good:
                outcome.at_least(what, times[peer] / min(good), floor)
            else:
                outcome.demand(what, False, f"its error is less: {tools[peer]['error']:.4f}", f">= {floor}x")


def _beats_llama_cpp(outcome: Outcome, where: str, key: str, times: Mapping[str, float], four: float | None) -> None:
    q8, q4 = (times.get(f"llama.cpp {kind}") for kind in ("Q8_0", "Q4_0"))
    if key == "smollm2-step":
        if q8 and INT8 in times:
            outcome.at_least(f"{where}: int8dq, of llama.cpp Q8_0", q8 / times[INT8], 1.1)
        if q4 and four:
            outcome.at_least(f"{where}: int4, of llama.cpp Q4_0", q4 / four, 1.1)
    elif q8 and q4 and INT8 in times:
        outcome.at_least(f"{where}: int8dq, of llama.cpp's best", min(q8, q4) / times[INT8], 1.5)


def skipped(results: Mapping[tuple[str, int], Found]) -> Iterator[str]:
    """A line for every tool that was not measured, and why."""
    for found in results.values():
        for name, one in found["tools"].items():
            if "skipped" in one:
                yield f"skipped: {name}, {found['name']}, {found['threads']} thread(s): {one['skipped']}"
