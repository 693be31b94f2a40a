"""One nn.Linear, compiled: float32 by Inductor beside backend="fxquant" (int8dq and int8wo), in turns in one process.

Activation quantization, Dynamo's guards and our runner are all inside the times. Two parts: a grid over N = K and M,
and odd sizes beside the next multiple of 64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Error,
    Outcome,
    WrongAnswer,
    arguments,
    finish,
    judged_by,
    kernels_run,
    milliseconds,
    progress,
)
from benchmarks.timing import Stats, paired, ratio
from fxquant import QuantConfig, QuantizingBackend

WIDTHS = (384, 1024, 4096)
ROWS = (1, 4, 16, 64, 256, 1024)
PRESETS = {"int8dq": "int8_linear_dynamic", "int8wo": "int8_linear_weight_only"}
# int8dq against float32 Inductor at N = K = 4096.
FLOORS = {1: 3.0, 16: 5.0, 256: 2.2}
# (N, K) odd; each is held against both rounded up to a multiple of 64.
ODD = ((4095, 4093), (1021, 1019), (383, 383))
ODD_ROWS = (1, 16, 256)
ODD_LIMIT = 1.3
# Two runs of the very same program differ by this much on a machine with neighbours.
NOISE = 0.03
# SQNR: int8 weights and activations of Gaussian data give about 40 dB; far below it something else is computed.
LEAST_SQNR = 36.0


@dataclass(frozen=True)
class Candidate:
    """A compiled linear that has been checked, and the kernel that report and profiler name; "float" if kept."""

    call: Callable[[Tensor], Tensor]
    kernel: str
    error: Error


@dataclass(frozen=True)
class Case:
    """One linear, timed: seconds by candidate, and what ran."""

    stats: dict[str, Stats]
    kernels: dict[str, str]
    errors: dict[str, Error]
    judged_by: Literal["median", "best"]

    def ratio(self, preset: str) -> float:
        """How many times faster than float, by the statistic that demands are held against."""
        return ratio(self.stats, "float", preset, self.judged_by)

    def too_slow(self, preset: str, floor: float = 0.0) -> bool:
        """True if it misses its floor, or if it was lowered and is slower than float."""
        lowered = self.kernels[preset] != "float"
        return self.ratio(preset) < max(floor, 1 - NOISE if lowered else 0.0)


def quantized(linear: nn.Linear, x: Tensor, preset: str, want: Tensor) -> Candidate:
    """The compiled candidate. Raises WrongAnswer if its result is wrong, or another kernel ran than the report says."""
    backend = QuantizingBackend(QuantConfig(preset=preset))
    call = torch.compile(linear, backend=backend, dynamic=False, fullgraph=True)
    error = Error.of(call(x), want)
    (site,) = (site for report in backend.reports for site in report.sites)
    ran = kernels_run(lambda: call(x))
    where = f"{preset}, {tuple(x.shape)} by {tuple(linear.weight.shape)}"
    if not error.sqnr >= LEAST_SQNR:
        raise WrongAnswer(where, f"an SQNR of {error.sqnr:.1f} dB", f"at least {LEAST_SQNR} dB")
    if site.status == "lowered" and (site.kernel != PRESETS[preset] or f"fxquant::{site.kernel}" not in ran):
        raise WrongAnswer(where, f"the report says {site.kernel}, {sorted(ran)} ran", PRESETS[preset])
    if site.status == "float" and any("fxquant" in name for name in ran):
        raise WrongAnswer(where, f"the report says float, {sorted(ran)} ran", "a float product")
    if site.status not in ("lowered", "float"):
        raise WrongAnswer(where, f"status {site.status}: {site.reason}", "a lowered site, or one kept float")
    return Candidate(call, site.kernel or "float", error)


@torch.no_grad()
def measure(width: int, rows: int, threads: int, seconds: float) -> Case:
    """Compile, check and time one linear."""
    torch._dynamo.reset()
    torch.manual_seed(width + rows)
    linear = nn.Linear(width, width).eval().requires_grad_(False)
    x = torch.randn(rows, width)
    want = linear(x)
    plain = torch.compile(linear, dynamic=False, fullgraph=True)
    torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-4)
    candidates = {preset: quantized(linear, x, preset, want) for preset in PRESETS}
    calls: dict[str, Callable[[], object]] = {"float": lambda: plain(x)}
    calls |= {preset: lambda call=c.call: call(x) for preset, c in candidates.items()}
    kernels, errors = ({p: getattr(c, what) for p, c in candidates.items()} for what in ("kernel", "error"))
    case = Case(paired(calls, seconds=seconds, min_rounds=5), kernels, errors, judged_by(threads))
    if any(case.too_slow(preset, floor_of(preset, width, rows)) for preset in PRESETS):
        # A second look, longer: a neighbour's burst is no verdict. The second times count.
        case = replace(case, stats=paired(calls, seconds=4 * seconds, min_rounds=15))
    return case


def floor_of(preset: str, width: int, rows: int) -> float:
    """The least ratio to float that is demanded there."""
    return FLOORS.get(rows, 0.0) if preset == "int8dq" and width == 4096 else 0.0


def row_of(case: Case, threads: int, width: int, rows: int) -> tuple[dict[str, str], dict[str, Any]]:
    """A row of the table, and its figures."""
    row = {"threads": str(threads), "N = K": str(width), "M": str(rows)}
    row["float ms"] = milliseconds(case.stats["float"].median)
    for preset in PRESETS:
        row[f"{preset} ms"] = milliseconds(case.stats[preset].median)
        row[f"{preset} ratio"] = f"{ratio(case.stats, 'float', preset):.2f}"
        row[f"{preset} kernel"] = case.kernels[preset]
    figures = {
        "threads": threads,
        "width": width,
        "rows": rows,
        "stats": {name: s.as_json() for name, s in case.stats.items()},
        "kernels": case.kernels,
        "errors": {name: asdict(e) for name, e in case.errors.items()},
    }
    return row, figures


def grid(outcome: Outcome, threads: int, widths: tuple[int, ...], rows: tuple[int, ...], seconds: float) -> None:
    """N = K over M, with the demands on speed."""
    slower: list[str] = []
    for width in widths:
        for m in rows:
            progress(f"linear {width} x {width}, M = {m}, {threads} thread(s)")
            case = measure(width, m, threads, seconds)
            row, figures = row_of(case, threads, width, m)
            outcome.add(row, **figures)
            slower += [f"{p} {width} M={m} ({case.ratio(p):.2f}x)" for p in PRESETS if case.too_slow(p)]
            if floor := floor_of("int8dq", width, m):
                what = f"int8dq, {width} x {width}, M = {m}, {threads} thread(s)"
                outcome.at_least(what, case.ratio("int8dq"), floor)
    what = f"no lowered site slower than float, {threads} thread(s), noise {NOISE:.0%}"
    outcome.demand(what, not slower, ", ".join(slower) or "none", "none")


def up(size: int) -> int:
    return -(-size // 64) * 64


def odd_sizes(outcome: Outcome, threads: int, sizes: tuple[tuple[int, int], ...], seconds: float) -> None:
    """The time per operation of odd sizes over that of the next multiple of 64, the two taking turns."""
    for n, k in sizes:
        progress(f"linear {n} x {k} beside {up(n)} x {up(k)}, {threads} thread(s)")
        for preset in PRESETS:
            costs = {m: odd_cost(n, k, m, preset, seconds) for m in ODD_ROWS}
            worst = max(costs, key=lambda m: costs[m])
            sizes_text = f"{n} x {k}: time per operation over {up(n)} x {up(k)}"
            what = f"{preset}, {sizes_text}, worst M = {worst}, {threads} thread(s)"
            outcome.at_most(what, costs[worst], ODD_LIMIT)


@torch.no_grad()
def odd_cost(n: int, k: int, m: int, preset: str, seconds: float) -> float:
    """Time per operation of the odd linear over that of the even one; a second, longer look if it is over the limit."""
    torch._dynamo.reset()
    calls: dict[str, Callable[[], object]] = {}
    for name, (rows, columns) in {"odd": (n, k), "even": (up(n), up(k))}.items():
        linear = nn.Linear(columns, rows).eval().requires_grad_(False)
        x = torch.randn(m, columns)
        candidate = quantized(linear, x, preset, linear(x))
        calls[name] = lambda call=candidate.call, x=x: call(x)
    for attempt in (1, 4):
        times = paired(calls, seconds=attempt * seconds, min_rounds=5)
        cost = (times["odd"].median / (n * k)) / (times["even"].median / (up(n) * up(k)))
        if cost <= ODD_LIMIT:
            break
    return cost


def main(chosen: argparse.Namespace) -> int:
    outcome = Outcome("linear_inductor", 'nn.Linear: float32 Inductor beside backend="fxquant", medians in turns')
    seconds = 0.3 if chosen.quick else 1.0
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        widths, rows = ((384, 1024), (1, 16, 256)) if chosen.quick else (WIDTHS, ROWS)
        grid(outcome, threads, widths, rows, seconds)
        if threads == chosen.threads[0]:
            odd_sizes(outcome, threads, ODD[1:] if chosen.quick else ODD, seconds / 2)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    sys.exit(main(parser.parse_args()))
