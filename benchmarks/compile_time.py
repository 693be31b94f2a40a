"""What quantizing adds to a cold compilation: all of our backend but Inductor, as a share of Inductor's own time.

Each candidate runs in a process and a cache folder of its own, after a small compilation that loads Inductor and its
C++ compiler. Ours is capture, passes, verification, binding and packing the weights: the time of the backend's call
minus the compile_fx inside it. Inductor's own is compile_fx, once of the float model and once of the lowered graph.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.harness import Outcome, arguments, finish, progress
from fxquant import QuantConfig, QuantizingBackend, cpu_kernels
from fxquant.weights import process_store
from tests.models import Decoder

LIMIT = 0.10
_LAST_LINE = "compile_time: "


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added up under `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return run


@contextmanager
def inductor_timed(clock: Clock) -> Iterator[Callable[..., Any]]:
    """Inside, Inductor's entry is timed under "inductor"; yields it as a Dynamo backend."""
    from torch._inductor import compile_fx as module

    timed = clock.timed("inductor", module.compile_fx)
    with mock.patch.object(module, "compile_fx", timed):
        yield timed


def first_call(model: nn.Module, backend: Callable[..., Any], *inputs: torch.Tensor) -> None:
    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(*inputs)


@torch.no_grad()
def child(candidate: str, layers: int, width: int) -> dict[str, Any]:
    """One cold compilation. Returns seconds: "inductor", "backend" and by stage."""
    cpu_kernels.load()  # built once a machine: not a part of compiling a model
    torch.set_num_threads(1)  # packing on one core: on more, a busy neighbour makes every barrier wait
    clock = Clock()
    backend = QuantizingBackend(QuantConfig(preset="int8dq"))
    with inductor_timed(clock) as inductor:
        run = inductor if candidate == "float" else clock.timed("backend", backend)
        small = nn.Sequential(nn.Linear(64, 64), nn.GELU()).eval().requires_grad_(False)
        first_call(small, run, torch.randn(2, 64))
        clock.seconds.clear()
        reports_before = len(backend.reports)
        torch.manual_seed(0)
        model = Decoder(width, layers, heads=16, kv_heads=4, hidden=width * 11 // 4, vocabulary=8192)
        store = process_store()
        with mock.patch.object(store, "entry", clock.timed("packing", store.entry)):
            first_call(model.eval().requires_grad_(False), run, torch.randint(0, 8192, (1, 1)))
    stages = [report.seconds for report in backend.reports[reports_before:]]
    return {**clock.seconds, "stages": {name: sum(s[name] for s in stages) for name in (stages[0] if stages else ())}}


def cold(candidate: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """`child` in a process of its own, with an empty cache folder."""
    progress(f"cold compilation of {chosen.layers} layers, {candidate}")
    command = [sys.executable, "-m", "benchmarks.compile_time", "--child", candidate, "--layers", str(chosen.layers)]
    with tempfile.TemporaryDirectory(prefix="fxquant-cold-") as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        done = subprocess.run(
            [*command, "--width", str(chosen.width)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    line = next(line for line in done.stdout.splitlines() if line.startswith(_LAST_LINE))
    return json.loads(line.removeprefix(_LAST_LINE))


def main(chosen: argparse.Namespace) -> int:
    if chosen.child:
        sys.stdout.write(_LAST_LINE + json.dumps(child(chosen.child, chosen.layers, chosen.width)) + "\n")
        return 0
    if chosen.quick:
        chosen.layers = min(chosen.layers, 2)
    what = f"{chosen.layers} layers of width {chosen.width}, one token"
    outcome = Outcome("compile_time", f"Cold compilation of the decoder, {what}")
    plain, ours = cold("float", chosen), cold("fxquant", chosen)
    added = ours["backend"] - ours["inductor"]
    passes = sum(ours["stages"].values())
    parts = {
        "Inductor, float model": plain["inductor"],
        "Inductor, lowered graph": ours["inductor"],
        "fxquant, all of it": added,
        **{f"  {name}": seconds for name, seconds in ours["stages"].items()},
        "  packing": ours["packing"],
        "  the rest (reading Dynamo's graph, report)": added - passes - ours["packing"],
    }
    for name, seconds in parts.items():
        row = {"part": name, "seconds": f"{seconds:.2f}", "of Inductor's own": f"{seconds / plain['inductor']:.1%}"}
        outcome.add(row, part=name.strip(), seconds=seconds, layers=chosen.layers, width=chosen.width)
    outcome.at_most(f"ours over Inductor's own (float model), {what}", added / plain["inductor"], LIMIT, "%")
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=6, help="24 is the model of the demand; it takes minutes")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--child", choices=("float", "fxquant"), help=argparse.SUPPRESS)
    sys.exit(main(parser.parse_args()))
