"""What a call costs beside its kernels: the stale-weight check, and all that the runner does before the lowered graph.

Measured on one token through a 24-layer decoder. Step and check take turns, so that each check finds the caches as a step
leaves them. The narrow decoder's whole step stands beside float32 Inductor's, for information.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, kernels_run, progress
from benchmarks.timing import paired, ratio
from fxquant import QuantConfig, QuantizingBackend
from fxquant.runner import GraphRunner
from tests.models import Decoder

LIMIT = 0.01


class Recording:
    """A QuantizingBackend that keeps the last arguments that Dynamo called its graph with."""

    def __init__(self) -> None:
        self.backend = QuantizingBackend(QuantConfig(preset="int8dq"))
        self.last: Sequence[Any] = ()

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        call = self.backend(gm, example_inputs)

        def run(*args: Any) -> Any:
            self.last = args
            return call(*args)

        return run

    @property
    def runner(self) -> GraphRunner:
        (runner,) = self.backend._runners
        return runner


def decoder(width: int, layers: int) -> tuple[Decoder, Tensor]:
    torch.manual_seed(0)
    model = Decoder(width, layers, heads=16, kv_heads=4, hidden=width * 11 // 4, vocabulary=8192)
    return model.eval().requires_grad_(False), torch.randint(0, 8192, (1, 1))


def compiled(model: Decoder, ids: Tensor) -> tuple[Recording, Callable[[], Tensor]]:
    """The quantized model, checked: its answer, and that every linear runs on the int8 kernel."""
    recording = Recording()
    fast = torch.compile(model, backend=recording, dynamic=False, fullgraph=True)
    error = Error.of(fast(ids), model(ids))
    counts = recording.backend.reports[0].counts
    ran = kernels_run(lambda: fast(ids))
    if not error.sqnr >= 15 or set(counts) != {"lowered"} or not any("fxquant::int8_linear" in name for name in ran):
        raise WrongAnswer("decoder", f"SQNR {error.sqnr:.1f} dB, {counts}, {sorted(ran)}", "all linears lowered")
    return recording, lambda: fast(ids)


def in_turns(fns: dict[str, Callable[[], object]], seconds: float, least: int = 15) -> dict[str, float]:
    """Median seconds of each, called once a turn without a warm-up of its own: each finds the caches as the last left them."""
    taken: dict[str, list[float]] = {name: [] for name in fns}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(taken[next(iter(fns))]) < least:
        for name, fn in fns.items():
            before = time.perf_counter()
            fn()
            taken[name].append(time.perf_counter() - before)
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def check_cost(outcome: Outcome, width: int, layers: int, seconds: float) -> None:
    """The parts of a call of the wide decoder."""
    progress(f"compiling {layers} layers of width {width}, int8dq")
    torch._dynamo.reset()
    recording, step = compiled(*decoder(width, layers))
    runner, args = recording.runner, recording.last
    bound = runner._set_for(args)
    spent = in_turns({"step": step, "check": lambda: runner._set_for(args)}, seconds)
    mapping = in_turns({"step": step, "mapping": lambda: bound.arguments(args)}, seconds / 4)["mapping"]
    warm = paired({"check": lambda: runner._set_for(args), "mapping": lambda: bound.arguments(args)}, seconds=seconds / 4)
    weights = len(runner._positions)
    parts = {
        "step, whole": spent["step"],
        f"stale-weight check, {weights} tensors": spent["check"],
        "argument mapping": mapping,
        "stale-weight check, caches warm": warm["check"].median,
        "argument mapping, caches warm": warm["mapping"].median,
    }
    for name, took in parts.items():
        row = {"decoder": f"{width} x {layers}", "part": name, "us": f"{1e6 * took:.1f}"}
        row["of a step"] = f"{took / spent['step']:.2%}"
        outcome.add(row, width=width, layers=layers, part=name, seconds=took)
    share = spent["check"] / spent["step"]
    outcome.at_most(f"stale-weight check of a step, {layers} layers of width {width}, one token", share, LIMIT, "%")


@torch.no_grad()
def narrow_step(outcome: Outcome, width: int, layers: int, seconds: float) -> None:
    """The narrow decoder's step, where overhead weighs most, beside float."""
    progress(f"compiling {layers} layers of width {width}, int8dq and float")
    torch._dynamo.reset()
    model, ids = decoder(width, layers)
    _, step = compiled(model, ids)
    plain = torch.compile(model, dynamic=False, fullgraph=True)
    stats = paired({"float": lambda: plain(ids), "int8dq": step}, seconds=seconds)
    for name, one in stats.items():
        row = {"decoder": f"{width} x {layers}", "part": f"step, {name}", "us": f"{1e6 * one.median:.1f}"}
        row["of a step"] = f"{ratio(stats, 'float', name):.2f}x of float's speed"
        outcome.add(row, width=width, layers=layers, part=f"step, {name}", seconds=one.median)


def main(chosen: argparse.Namespace) -> int:
    torch.set_num_threads(chosen.threads)
    outcome = Outcome("stale_check", f"Overhead of a call, one token, {chosen.threads} thread(s)")
    layers = 4 if chosen.quick else 24
    check_cost(outcome, 1024, layers, 2.0 if chosen.quick else 10.0)
    narrow_step(outcome, 256, layers, 1.0 if chosen.quick else 4.0)
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    sys.exit(main(parser.parse_args()))
