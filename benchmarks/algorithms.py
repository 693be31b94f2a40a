"""Choosing codes: what absmax, min-max, mse and hqq cost, in copies of the same weight, and what errors they leave.

A cost is a ratio to one `copy_` of the float32 weight, which takes turns with the algorithms in the same process: what
a quantization would cost if it did nothing but read the weight and write as much. Errors are relative Frobenius errors
and mean absolute errors on N(0, 1), 1024 x 1024; those that Quanto reaches in the same scheme are demands.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, judged_by, milliseconds, progress
from benchmarks.timing import paired, ratio
from fxquant.algorithms import quantize
from fxquant.numerics import decode
from fxquant.spec import TensorSpec

ALGORITHMS = ("auto", "mse", "hqq")
# Copies that an algorithm may cost; auto is absmax for the first and min-max for the second.
LIMITS = {
    ("int8/channel", "auto"): 12,
    ("int4/group128/affine/bf16", "auto"): 16,
    ("int8/channel", "mse"): 150,
    ("int4/group128/affine/bf16", "mse"): 150,
    ("int8/channel", "hqq"): 600,
    ("int4/group128/affine/bf16", "hqq"): 600,
}
TIMED = tuple(dict.fromkeys(spec for spec, _ in LIMITS))
SPECS = (
    *TIMED,
    *("int4/group32/affine/bf16", "int4/group128", "int4/group128/shift", "int3/group128/shift", "int2/group128/shift"),
    *("int2/group32/affine/bf16", "float8_e4m3fn/channel", "fp6_e3m2/channel", "fp4_e2m1/channel"),
    *("mxfp8", "mxfp6", "mxfp4", "nvfp4"),
)
# Quanto's MaxOptimizer and HqqOptimizer on such a weight, per group of 128 with a float shift.
QUANTO = {"int4/group128/shift": {"auto": 0.0998, "hqq": 0.0966}, "int2/group128/shift": {"auto": 0.501, "hqq": 0.491}}


def decoded(x: Tensor, spec: TensorSpec, algorithm: str) -> Tensor:
    codes, scale, zero_point, tensor_scale = quantize(x, spec, algorithm)
    return decode(codes, scale, zero_point, spec, torch.float32, tensor_scale)


def costs(outcome: Outcome, text: str, size: int, threads: int, rounds: int) -> dict[str, tuple[str, str]]:
    """Milliseconds and copies of each algorithm for one spec, and the demands on them."""
    progress(f"{text}, {size} x {size}")
    spec, x = TensorSpec.parse(text), torch.randn(size, size)
    target = torch.empty_like(x)
    fns = {name: lambda name=name: quantize(x, spec, name) for name in ALGORITHMS}
    stats = paired({"copy": lambda: target.copy_(x), **fns}, seconds=0, min_rounds=rounds)
    figure = judged_by(threads)
    found = {}
    for name in ALGORITHMS:
        copies = ratio(stats, name, "copy", figure)
        found[name] = (milliseconds(getattr(stats[name], figure)), f"{copies:.1f}")
        outcome.at_most(f"{text}, {name}, in copies of the weight", copies, LIMITS[text, name])
    return found


def row(outcome: Outcome, x: Tensor, text: str, algorithm: str, cost: tuple[str, str]) -> None:
    spec = TensorSpec.parse(text)
    got = decoded(x, spec, algorithm)
    error, mean = Error.of(got, x), float((got - x).abs().mean())
    if not error.relative < 1:
        raise WrongAnswer(f"{text}, {algorithm}", f"relative error {error.relative:.3f}", "less than 1")
    cells = {"spec": text, "algorithm": algorithm, "rel. error": f"{error.relative:.4f}", "mean error": f"{mean:.4f}"}
    outcome.add({**cells, "ms": cost[0], "copies": cost[1]}, spec=text, algorithm=algorithm, relative=error.relative)
    if wanted := QUANTO.get(text, {}).get(algorithm):
        # Quanto's figures have three digits.
        ok = error.relative <= wanted * (1 + 5e-4)
        outcome.demand(f"{text}, {algorithm}, relative error", ok, f"{error.relative:.4f}", f"<= {wanted}")


def main(chosen: argparse.Namespace) -> int:
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    outcome = Outcome("algorithms", f"Choosing codes, {chosen.threads} thread(s)")
    size, rounds = (1024, 3) if chosen.quick else (4096, 5)
    cost = {text: costs(outcome, text, size, chosen.threads, rounds) for text in TIMED}
    x = torch.randn(1024, 1024)
    for text in SPECS:
        for algorithm in ALGORITHMS:
            row(outcome, x, text, algorithm, cost.get(text, {}).get(algorithm, ("", "")))
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    sys.exit(main(parser.parse_args()))
