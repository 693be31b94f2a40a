"""What a call costs beside its kernels: the stale-weight check, and all that the runner does before the lowered graph.

Measured on one token through a 24-layer decoder, inside the step: there the check finds caches that hundreds of
megabytes of weights have just passed through, which costs several times what it costs called again and again. The
narrow decoder's whole step stands beside float32 Inductor's, for information.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

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
        assert isinstance(runner, GraphRunner)
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
    counts = recording.backend.reports[0].counts_of("linear")
    ran = kernels_run(lambda: fast(ids))
    if not error.sqnr >= 15 or set(counts) != {"lowered"} or not any("fxquant::int8_linear" in name for name in ran):
        raise WrongAnswer("decoder", f"SQNR {error.sqnr:.1f} dB, {counts}, {sorted(ran)}", "all linears lowered")
    return recording, lambda: fast(ids)


class Timed:
    """A function that notes how long each call took."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self.taken: list[float] = []

    def __call__(self, *args: Any) -> Any:
        started = time.perf_counter()
        result = self._fn(*args)
        self.taken.append(time.perf_counter() - started)
        return result

    @property
    def median(self) -> float:
        return statistics.median(self.taken)


def inside_steps(runner: GraphRunner, step: Callable[[], object], seconds: float) -> dict[str, Timed]:
    """The whole step, and in every other one the check and the argument mapping as they run inside of it."""
    bound = next(iter(runner._sets.values()))
    timed = {"step": Timed(step), "check": Timed(runner._set_for), "mapping": Timed(bound.arguments)}
    for _ in range(3):
        step()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(timed["step"].taken) < 15:
        timed["step"]()
        with (
            mock.patch.object(runner, "_set_for", timed["check"]),
            mock.patch.object(bound, "arguments", timed["mapping"]),
        ):
            step()
    return timed


@torch.no_grad()
def check_cost(outcome: Outcome, width: int, layers: int, seconds: float) -> None:
    """The parts of a call of the wide decoder."""
    progress(f"compiling {layers} layers of width {width}, int8dq")
    torch._dynamo.reset()
    recording, step = compiled(*decoder(width, layers))
    runner, args = recording.runner, recording.last
    spent = inside_steps(runner, step, seconds)
    warm = paired({"check": lambda: runner._set_for(args)}, seconds=seconds / 4)["check"]
    whole, check = spent["step"].median, spent["check"].median
    parts = {
        "step, whole": whole,
        f"stale-weight check, {len(runner._positions)} tensors": check,
        "argument mapping": spent["mapping"].median,
        "stale-weight check, called again and again (caches warm)": warm.median,
    }
    for name, took in parts.items():
        share = f"{took / whole:.2%} of a step"
        row = {"decoder": f"{width} x {layers}", "part": name, "us": f"{1e6 * took:.1f}", "of": share}
        outcome.add(row, width=width, layers=layers, part=name, seconds=took)
    what = f"stale-weight check of a step, {layers} layers of width {width}, one token"
    outcome.at_most(what, check / whole, LIMIT, "%")


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
        row["of"] = f"{ratio(stats, 'float', name):.2f}x as fast as float"
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
