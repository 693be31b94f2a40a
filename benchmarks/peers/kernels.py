"""One linear, N = K = 4096, beside oneDNN, other tools and the machine's limits: results, demands and a roofline.

The limits are measured, not looked up: a loop that only reads, and one of dpbusd that never leaves the registers, each
in turn with the kernel it is held against.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fxquant
from benchmarks import linear_kernels
from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, judged_by, milliseconds, progress
from benchmarks.peers import exported, limits, plots, torch_tools
from benchmarks.peers.absent import Absent
from benchmarks.peers.eager import PRESETS
from benchmarks.peers.ours import FLOAT, plain, with_kernels
from benchmarks.peers.subjects import Subject
from benchmarks.timing import Stats, paired, ratio

SIZE = 4096
ROWS = linear_kernels.ROWS
PEER_ROWS = (1, 1024)
BYTES = {"int8dq": 1.0, "int8wo": 1.0, "int4dq": 0.5625, "int4wo": 0.523}  # a weight, its share of scales included
MEMORY = 256 * 2**20
SHARE_OF_READS = {"int8wo": 0.8, "int4wo": 0.7}
SHARE_OF_PEAK = 0.7
ROUNDED = 0.03  # of float's answer: oneDNN's, in 8 bits
INT4WO_FLOORS = {1: 4.5, 1024: 0.95}


def frozen(linear: nn.Linear, preset: str) -> nn.Module:
    quantized = copy.deepcopy(linear)
    fxquant.quantize(quantized, preset)
    fxquant.freeze(quantized)
    return quantized


def _check(what: str, got: Tensor, want: Tensor, limit: float) -> None:
    error = Error.of(got, want).relative
    if not error <= limit:
        raise WrongAnswer(what, f"relative error {error:.3f}", f"{limit} at most")


def beside_onednn(outcome: Outcome, linear: nn.Linear, threads: int, seconds: float) -> list[plots.Point]:
    """Every preset at every number of rows, with oneDNN's product and, at 1024 rows, the dpbusd loop."""
    modules = {preset: frozen(linear, preset) for preset in PRESETS if preset.startswith("int4")}
    points = []
    for rows in ROWS:
        progress(f"kernels, {rows} rows, {threads} thread(s)")
        case = linear_kernels.make_case(SIZE, rows)
        want, grouped = nn.functional.linear(case.x, case.weight), linear(case.x)
        calls = linear_kernels.candidates(case)  # float, int8 and oneDNN as bare calls of the op
        calls.pop("onednn bare", None)
        calls |= {preset: partial(module, case.x) for preset, module in modules.items()}
        for name, call in calls.items():
            _check(f"{name}, {rows} rows", call(), grouped if name in modules else want, PRESETS.get(name, ROUNDED))
        fns: dict[str, Callable[[], object]] = {**calls}
        if rows == max(ROWS):
            fns |= _loop(rows, threads)
        stats = paired(fns, seconds=seconds, min_rounds=5)
        _row(outcome, rows, threads, stats)
        _demands(outcome, rows, threads, stats)
        points += [_point(f"fxquant {p}", rows, stats[p].median, BYTES[p]) for p in PRESETS]
        points += [_point("oneDNN u8 x s8", rows, stats["onednn"].median, 1.0)] if "onednn" in stats else []
    return points


def _loop(rows: int, threads: int) -> dict[str, Callable[[], object]]:
    try:
        return {"dpbusd": limits.product_loop(2 * rows * SIZE * SIZE, threads)}
    except Absent as absent:
        progress(str(absent))
        return {}


def _point(tool: str, rows: int, seconds: float, bytes_a_weight: float) -> plots.Point:
    return plots.Point(tool, rows, 2 * rows / bytes_a_weight, 2e-9 * rows * SIZE * SIZE / seconds)


def _row(outcome: Outcome, rows: int, threads: int, stats: dict[str, Stats]) -> None:
    names = ("float", *PRESETS, "onednn", "dpbusd")
    times = {f"{n} ms": milliseconds(stats[n].median) if n in stats else "" for n in names}
    gops = 2e-9 * rows * SIZE * SIZE / stats["int8dq"].median
    row = {"rows": str(rows), "threads": str(threads), **times, "int8dq GOPS": f"{gops:.0f}"}
    outcome.add(row, rows=rows, threads=threads, stats={n: s.as_json() for n, s in stats.items()})


def _demands(outcome: Outcome, rows: int, threads: int, stats: dict[str, Stats]) -> None:
    where, figure = f"{rows} x {SIZE}, {threads} thread(s)", judged_by(threads)
    if "onednn" in stats:
        outcome.at_least(f"{where}: int8dq, of oneDNN", ratio(stats, "onednn", "int8dq", figure), 1.0)
    if rows in INT4WO_FLOORS:
        outcome.at_least(f"{where}: int4wo, of float", ratio(stats, "float", "int4wo", figure), INT4WO_FLOORS[rows])
    if rows == 1024:
        outcome.at_least(f"{where}: int4dq, of int8dq", ratio(stats, "int8dq", "int4dq", figure), 0.8)
    if "dpbusd" in stats:
        share = ratio(stats, "dpbusd", "int8dq", figure)
        outcome.at_least(f"{where}: int8dq, of a bare dpbusd loop", share, SHARE_OF_PEAK)


def bandwidth(outcome: Outcome, preset: str, threads: int, seconds: float) -> float:
    """One row through at least 256 MB of different weights beside a loop over the same buffers; its bytes a second."""
    progress(f"{preset}: bandwidth, {threads} thread(s)")
    modules: list[nn.Module] = []
    while sum(b.nbytes for b in _weights(modules)) < MEMORY:
        modules.append(frozen(nn.Linear(SIZE, SIZE, bias=False), preset))
    x, buffers = torch.randn(1, SIZE), list(_weights(modules))

    def run() -> None:
        for module in modules:
            module(x)

    fns: dict[str, Callable[[], object]] = {"read": limits.read_loop(buffers, threads), preset: run}
    stats = paired(fns, seconds=seconds, min_rounds=7)
    size = sum(b.nbytes for b in buffers)
    what = f"1 row, {size / 2**20:.0f} MB of weights, {threads} thread(s): {preset}, of a read loop"
    outcome.at_least(what, ratio(stats, "read", preset, judged_by(threads)), SHARE_OF_READS[preset])
    return size / stats["read"].median


def _weights(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    return (b for module in modules for b in module.buffers() if b.nbytes >= 4096)


def peers(linear: nn.Linear, seconds: float) -> tuple[list[plots.Point], list[str]]:
    """Other tools' whole linear on one thread; which of them were not to be had, and why."""
    tools = {FLOAT: plain, **exported.TOOLS, **torch_tools.TOOLS}
    del tools["torchao int8wo"]  # half a minute of max-autotune, for twice float's time at one row
    points, missing = [], dict[str, str]()
    for rows in PEER_ROWS:
        model = nn.Sequential(linear)
        subject = Subject("linear", model, (torch.randn(rows, SIZE),), [(torch.randn(rows, SIZE),) for _ in range(4)])
        want, fns = model(*subject.inputs), dict[str, Callable[[], object]]()
        for name in (name for name in tools if name not in missing):
            progress(f"kernels, {rows} rows: {name}")
            try:
                fn = tools[name](subject, 1)
                _check(name, fn(), want, 0.3)
            except Exception as failure:  # a peer's failure is said, and the others go on
                missing[name] = f"{type(failure).__name__}: {str(failure).strip()[:120]}"
                continue
            fns[name] = fn
        stats = paired(fns, seconds=seconds, min_rounds=5)
        weight = {FLOAT: 4.0, "OpenVINO 4-bit weights": 0.53}
        points += [_point(name, rows, one.median, weight.get(name, 1.0)) for name, one in stats.items()]
    return points, [f"{name}: {why}" for name, why in missing.items()]


@torch.no_grad()
def main(chosen: argparse.Namespace) -> int:
    with_kernels()
    torch.manual_seed(0)
    outcome = Outcome("peers.kernels", f"One linear {SIZE} x {SIZE} beside oneDNN and the machine's limits")
    linear = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    seconds = 1.0 if chosen.quick else 4.0
    drawn: Sequence[plots.Point] = []
    speed = 0.0
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        points = beside_onednn(outcome, linear, threads, seconds)
        reads = [bandwidth(outcome, preset, threads, seconds) for preset in SHARE_OF_READS]
        if threads == chosen.threads[0]:
            drawn, speed = points, max(reads)
    torch.set_num_threads(1)
    others, missing = peers(linear, seconds / 2) if chosen.threads[0] == 1 else ([], [])
    outcome.notes.extend(f"skipped: {line}" for line in missing)
    outcome.notes.extend(f"{p.tool}, {p.rows} rows: {p.gops:.1f} GOPS" for p in others)
    outcome.notes.append(f"one core reads {speed / 1e9:.1f} GB/s and multiplies {_peak(outcome) / 1e9:.0f} GOPS")
    status = finish(outcome, chosen)
    peak = _peak(outcome)
    if peak:
        plots.roofline([*drawn, *others], speed, peak, chosen.results / "peers.roofline.png")
    return status


def _peak(outcome: Outcome) -> float:
    """Operations a second of the bare loop, of the first thread count; 0 where there is none."""
    for one in outcome.figures:
        if "dpbusd" in one["stats"]:
            return 2 * one["rows"] * SIZE * SIZE / one["stats"]["dpbusd"]["median"]
    return 0.0


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    sys.exit(main(parser.parse_args()))
