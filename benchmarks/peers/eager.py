"""Quantized modules without torch.compile: how long a frozen Linear takes beside the float one, at each batch size."""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial

import torch
from torch import nn

import fxquant
from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, judged_by, milliseconds, progress
from benchmarks.peers.ours import with_kernels
from benchmarks.timing import paired, ratio

ROWS = (1, 16, 128, 1024)
SIZES = (1024, 4096)
# The largest relative error of a linear on normal weights and inputs: 4 bits in groups leave about 0.1.
PRESETS = {"int8dq": 0.03, "int8wo": 0.02, "int4dq": 0.15, "int4wo": 0.15}
LIMIT = 1.2


@torch.no_grad()
def measure(outcome: Outcome, linear: nn.Linear, preset: str, threads: int, seconds: float) -> None:
    quantized = copy.deepcopy(linear)
    fxquant.quantize(quantized, preset)
    fxquant.freeze(quantized)
    size = linear.in_features
    for rows in ROWS:
        x = torch.randn(rows, size)
        error = Error.of(quantized(x), linear(x))
        if not error.relative <= PRESETS[preset]:
            raise WrongAnswer(f"{preset}, {rows} rows", f"relative error {error.relative:.3f}", str(PRESETS[preset]))
        stats = paired({"float": partial(linear, x), "quantized": partial(quantized, x)}, seconds=seconds, min_rounds=5)
        cost = ratio(stats, "quantized", "float", judged_by(threads))
        what = f"{preset}, {rows} x {size}, {threads} thread(s)"
        row = {"linear": what, **{f"{n} ms": milliseconds(s.median) for n, s in stats.items()}}
        row |= {"of float's time": f"{cost:.2f}x", "rel. error": f"{error.relative:.4f}"}
        figures = {name: s.as_json() for name, s in stats.items()}
        outcome.add(row, preset=preset, rows=rows, size=size, threads=threads, error=error.relative, stats=figures)
        outcome.at_most(f"eager, time of float: {what}", cost, LIMIT)


def main(chosen: argparse.Namespace) -> int:
    with_kernels()
    outcome = Outcome("peers.eager", "Frozen Linear in plain eager beside float eager")
    torch.manual_seed(0)
    linears = [nn.Linear(size, size) for size in (SIZES[:1] if chosen.quick else SIZES)]
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        for linear in linears:
            for preset in PRESETS:
                progress(f"eager {preset}, {linear.in_features}, {threads} thread(s)")
                measure(outcome, linear, preset, threads, 0.1 if chosen.quick else 0.4)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    sys.exit(main(parser.parse_args()))
