"""Off the beaten track: odd N and K beside the next multiple of 64, and a CPU without AVX512.

The latter in a process of its own, where torch, MKL and oneDNN are held to AVX2 by their environment variables and our
kernel by its argument.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import linear_kernels
from benchmarks.harness import Outcome, WrongAnswer, arguments, finish, judged_by, milliseconds, progress
from benchmarks.peers.ours import with_kernels
from benchmarks.timing import paired
from fxquant.tuning import cpu

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2_FLOOR = 2.0
SIZES = (1024, 4096)


def odd(outcome: Outcome, threads: int, seconds: float) -> None:
    """linear_kernels' odd sizes in both kernels, by the medians of turns."""
    for found in linear_kernels.odd_sizes(list(linear_kernels.SIZES), seconds):
        what = f"{found.rows} x {found.size} beside {found.even}, {threads} thread(s)"
        costs = {"int8dq": found.dynamic, "int8wo": found.weight_only}
        outcome.add({"case": what, **{f"{n}, cost": f"{c:.2f}x" for n, c in costs.items()}, "float ms": ""}, **costs)
        for name, cost in costs.items():
            outcome.at_most(f"{name}, time per operation: {what}", cost, linear_kernels.ODD_CEILING)


def without_avx512(outcome: Outcome, threads: int, seconds: float) -> None:
    """One row, float and ours both with AVX2."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.sizes", "--inside", str(seconds)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], env={**os.environ, **AVX2}, capture_output=True, text=True, check=True
    )
    for size, times in json.loads(done.stdout.splitlines()[-1]).items():
        what = f"1 x {size}, AVX2, {threads} thread(s)"
        costs = {name: times[name] / times["float"] for name in ("int8dq", "int8wo")}
        words = {f"{name}, cost": f"{cost:.2f}x" for name, cost in costs.items()}
        outcome.add({"case": what, **words, "float ms": milliseconds(times["float"])}, **times)
        for name, cost in costs.items():
            outcome.at_least(f"{name}, of float: {what}", 1 / cost, AVX2_FLOOR)


def inside(threads: int, seconds: float) -> dict[int, dict[str, float]]:
    """What the process with AVX2 alone measures: seconds by size and candidate."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        raise WrongAnswer("AVX2", torch.backends.cpu.get_cpu_capability(), "AVX2")
    isa = cpu.ISAS["avxvnni" if torch.cpu.get_capabilities().get("avx_vnni") else "avx2"]  # what is left without AVX512
    found: dict[int, dict[str, float]] = {}
    for size in SIZES:
        case = linear_kernels.make_case(size, 1)
        tail = case.x, case.packed, case.scale, None, size, isa
        fns: dict[str, Callable[[], Tensor]] = {
            "float": lambda case=case: torch.nn.functional.linear(case.x, case.weight),
            "int8dq": lambda tail=tail: torch.ops.fxquant.int8_linear_dynamic.default(*tail),
            "int8wo": lambda tail=tail: torch.ops.fxquant.int8_linear_weight_only.default(*tail),
        }
        linear_kernels.check_answers(case, fns)
        stats = paired(fns, seconds=seconds)
        found[size] = {name: getattr(one, judged_by(threads)) for name, one in stats.items()}
    return found


@torch.inference_mode()  # as compiled and frozen models call the kernels: below autograd, whose Python takes 4 us
def main(chosen: argparse.Namespace) -> int:
    with_kernels()
    if chosen.inside:
        torch.set_num_threads(chosen.threads[0])
        sys.stdout.write(json.dumps(inside(chosen.threads[0], chosen.inside)) + "\n")
        return 0
    outcome = Outcome("peers.sizes", "Odd sizes, in the time per operation of even ones; AVX2, in that of float's AVX2")
    seconds = 0.2 if chosen.quick else 0.6
    for threads in chosen.threads:
        progress(f"odd sizes and AVX2, {threads} thread(s)")
        torch.set_num_threads(threads)
        odd(outcome, threads, seconds)
        without_avx512(outcome, threads, 4 * seconds)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--inside", type=float, default=0.0, help=argparse.SUPPRESS)
    sys.exit(main(parser.parse_args()))
