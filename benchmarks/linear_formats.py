"""One nn.Linear in every preset: backend="fxquant" beside float32 Inductor, in turns in one process; packing too.

Quantizing the activation, Dynamo's guards and our runner are all inside the times. N = K; a ratio is time over float's
time: below 1 is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

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
from benchmarks.timing import Stats, paired
from fxquant import QuantConfig, QuantizingBackend, cpu_kernels
from fxquant.algorithms import quantize
from fxquant.spec.presets import PRESETS

WIDTH = 4096
ROWS = (1, 16, 256)
# The most that a preset may take, in units of float's time, by rows.
LIMITS = {1: 1.15, 256: 1.6}
# These have to take less than float at M = 1.
FASTER = ("int8wo", "int4wo", "int4wo-g32", "int2wo")
# Packing codes once, in units of one copy_ of the float32 weight.
MOST_COPIES = 10.0
# SQNR in dB on Gaussian data by bits of the weight's codes; far below it something else is computed.
LEAST_SQNR = {2: 3.0, 4: 13.0, 5: 16.0, 6: 20.0, 8: 22.0}


@dataclass(frozen=True)
class Candidate:
    """A compiled linear that has been checked, and the kernel that its report and the profiler name."""

    call: Callable[[Tensor], Tensor]
    kernel: str
    error: Error


@torch.no_grad()
def quantized(linear: nn.Linear, x: Tensor, preset: str, want: Tensor) -> Candidate:
    """The compiled candidate. Raises WrongAnswer if its result is wrong, or another kernel ran than the report says."""
    backend = QuantizingBackend(QuantConfig(preset=preset))
    call = torch.compile(linear, backend=backend, dynamic=False, fullgraph=True)
    error = Error.of(call(x), want)
    (site,) = (site for report in backend.reports for site in report.sites)
    where = f"{preset}, {tuple(x.shape)} by {tuple(linear.weight.shape)}"
    weights = PRESETS[preset].weights
    least = LEAST_SQNR[weights.format.bits] if weights else 0.0
    if not error.sqnr >= least:
        raise WrongAnswer(where, f"an SQNR of {error.sqnr:.1f} dB", f"at least {least} dB")
    ran = kernels_run(lambda: call(x))
    if site.status != "lowered" or f"fxquant::{site.kernel}" not in ran:
        raise WrongAnswer(
            where, f"{site.status}, {site.kernel} by the report, {sorted(ran)} by the profiler", "a kernel"
        )
    return Candidate(call, site.kernel or "", error)


@torch.no_grad()
def measure(outcome: Outcome, linear: nn.Linear, rows: int, threads: int, seconds: float) -> None:
    """Compile, check and time every preset at one number of rows; rows of the table, and what must hold."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2 * len(PRESETS)  # all of them are one forward with another backend
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(rows))
    want = linear(x)
    plain = torch.compile(linear, dynamic=False, fullgraph=True)
    torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-4)
    found = {}
    for preset in PRESETS:
        progress(f"{preset}, M = {rows}, {threads} thread(s)")
        found[preset] = quantized(linear, x, preset, want)
    calls: dict[str, Callable[[], object]] = {"float": lambda: plain(x)}
    calls |= {name: lambda call=c.call: call(x) for name, c in found.items()}
    figure = judged_by(threads)
    stats = paired(calls, seconds=seconds, min_rounds=7)
    if any(over(stats, name, rows, figure) for name in found):
        stats = paired(calls, seconds=3 * seconds, min_rounds=21)  # a neighbour's burst is no verdict; this counts
    for name, candidate in found.items():
        ratio = relative(stats, name, figure)
        row = {"threads": str(threads), "M": str(rows), "preset": name, "kernel": candidate.kernel}
        row |= {"float ms": milliseconds(stats["float"].median), "ms": milliseconds(stats[name].median)}
        row |= {"over float": f"{ratio:.2f}", "SQNR dB": f"{candidate.error.sqnr:.1f}"}
        times = {which: stats[which].as_json() for which in ("float", name)}
        outcome.add(row, threads=threads, rows=rows, preset=name, stats=times, error=asdict(candidate.error))
        if rows in LIMITS:
            outcome.at_most(f"{name}, M = {rows}, {threads} thread(s): time over float's", ratio, limit(name, rows))


def relative(stats: dict[str, Stats], name: str, figure: Literal["median", "best"]) -> float:
    return getattr(stats[name], figure) / getattr(stats["float"], figure)


def limit(preset: str, rows: int) -> float:
    return 1.0 if rows == 1 and preset in FASTER else LIMITS[rows]


def over(stats: dict[str, Stats], preset: str, rows: int, figure: Literal["median", "best"]) -> bool:
    return rows in LIMITS and relative(stats, preset, figure) > limit(preset, rows)


@torch.no_grad()
def packing(outcome: Outcome, weight: Tensor, seconds: float) -> None:
    """pack_panels and pack_granules of each preset's codes, in units of one copy_ of the weight."""
    other = torch.empty_like(weight)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: other.copy_(weight)}
    for name, preset in PRESETS.items():
        if preset.weights is None:
            continue
        codes, scale, *_ = quantize(weight, preset.weights)
        calls[name] = lambda codes=codes, scale=scale, text=str(preset.weights): (
            torch.ops.fxquant.pack_panels(codes, text),
            torch.ops.fxquant.pack_granules(scale, text, *codes.shape),
        )
    stats = paired(calls, seconds=seconds, min_rounds=5)
    worst = max((name for name in calls if name != "copy"), key=lambda name: stats[name].median)
    copies = stats[worst].median / stats["copy"].median
    what = f"packing {tuple(weight.shape)}, the slowest preset ({worst}), in copies of the float32 weight"
    outcome.at_most(what, copies, MOST_COPIES)


def main(chosen: argparse.Namespace) -> int:
    if cpu_kernels.load() is None:
        raise SystemExit("no kernels: nothing to measure")
    outcome = Outcome("linear_formats", f"nn.Linear {WIDTH} x {WIDTH} in every preset, beside float32 Inductor")
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH).eval().requires_grad_(False)
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        for rows in (1, 256) if chosen.quick else ROWS:
            measure(outcome, linear, rows, threads, 3.0 if chosen.quick else 10.0)
    progress("packing")
    packing(outcome, linear.weight, 3.0)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    sys.exit(main(parser.parse_args()))
