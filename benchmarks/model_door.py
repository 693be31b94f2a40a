"""Quantized modules in plain eager: against float and against Optimum Quanto, on one thread and in one process.

A frozen weight-only Linear 2048 x 2048 in each format that both have; int8dq at several batch sizes; and what
`quantize` and `freeze` of 100 million weights cost, in copies of these weights. All candidates take turns; times are
ratios to float's in the same run.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.harness import Error, Outcome, WrongAnswer, arguments, finish, milliseconds, progress
from benchmarks.timing import Stats, paired, ratio

SIZE = 2048
# Quanto's name of a format, ours, the largest relative error that the format may have, and whether at one row it has to
# beat float.
FORMATS = (
    ("qint8", "int8", 0.02, True),
    ("qfloat8_e4m3fn", "float8_e4m3fn", 0.05, False),
    ("qfloat8_e5m2", "float8_e5m2", 0.1, False),
    ("qint4", "int4", 0.15, True),
    ("qint2", "int2", 0.7, True),
)
ROWS_WEIGHT_ONLY = (1, 64)
ROWS_DYNAMIC = (1, 16, 128, 1024)
LAYERS = 6  # of 4096 x 4096: 100.7 million weights
COPIES = 15


def ours(linear: nn.Linear, **config: object) -> nn.Module:
    """A frozen copy. `config` as `fxquant.quantize` takes it."""
    quantized = copy.deepcopy(linear)
    fxquant.quantize(quantized, **config)  # pyright: ignore[reportArgumentType]
    fxquant.freeze(quantized)
    return quantized


def quantos(linear: nn.Linear, name: str) -> nn.Module:
    """The same by Optimum Quanto, which wants a parent module. (Its int4 fails under torch.inference_mode.)"""
    from optimum import quanto

    parent = nn.Sequential(copy.deepcopy(linear))
    quanto.quantize(parent, weights=quanto.qtypes[name])
    quanto.freeze(parent)
    return parent[0]


def timed(modules: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, Stats]:
    calls: dict[str, Callable[[], object]] = {name: lambda m=module: m(x) for name, module in modules.items()}
    with torch.no_grad():
        return paired(calls, seconds=seconds)


def check(what: str, module: nn.Module, x: Tensor, want: Tensor, limit: float) -> float:
    with torch.no_grad():
        error = Error.of(module(x), want)
    if not error.relative < limit:
        raise WrongAnswer(what, f"relative error {error.relative:.4f}", f"less than {limit}")
    return error.relative


def weight_only(outcome: Outcome, linear: nn.Linear, seconds: float) -> None:
    for quanto_name, name, limit, beats_float in FORMATS:
        progress(f"weight-only {name}")
        modules = {"float": linear, "quanto": quantos(linear, quanto_name), "fxquant": ours(linear, weights=name)}
        for rows in ROWS_WEIGHT_ONLY:
            x = torch.randn(rows, SIZE)
            with torch.no_grad():
                want = linear(x)
            errors = {
                name: check(f"{name}, {rows} rows", modules[name], x, want, limit) for name in ("quanto", "fxquant")
            }
            stats = timed(modules, x, seconds)
            _row(outcome, f"{name} weight-only", rows, stats, errors)
            outcome.at_least(f"{name}, {rows} rows: as fast as Quanto, times", ratio(stats, "quanto", "fxquant"), 1)
            if rows == 1 and beats_float:
                outcome.at_least(f"{name}, {rows} rows: as fast as float, times", ratio(stats, "float", "fxquant"), 1)


def dynamic(outcome: Outcome, linear: nn.Linear, seconds: float) -> None:
    module = ours(linear, config="int8dq")
    for rows in ROWS_DYNAMIC:
        progress(f"int8dq, {rows} rows")
        x = torch.randn(rows, SIZE)
        with torch.no_grad():
            want = linear(x)
        error = check(f"int8dq, {rows} rows", module, x, want, 0.03)
        stats = timed({"float": linear, "fxquant": module}, x, seconds)
        _row(outcome, "int8dq", rows, stats, {"fxquant": error})
        outcome.at_most(f"int8dq, {rows} rows: time of float", ratio(stats, "fxquant", "float"), 1.2)


def quantizing(outcome: Outcome, layers: int, rounds: int) -> None:
    """quantize and freeze of a model, in copies of its weights; each round has a fresh model of the same storage."""
    progress(f"quantize and freeze {layers} layers")
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(layers)))
    targets = [torch.empty_like(p) for p in model.parameters()]

    def copies() -> None:
        for target, source in zip(targets, model.parameters(), strict=True):
            target.detach().copy_(source.detach())

    def quantized() -> None:
        fresh = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, device="meta") for _ in range(layers)))
        for layer, source in zip(fresh, model, strict=True):
            layer.weight = source.weight
        fxquant.quantize(fresh, weights="int8")
        fxquant.freeze(fresh)

    stats = paired({"copy": copies, "fxquant": quantized}, seconds=0, min_rounds=rounds)
    found = ratio(stats, "fxquant", "copy")
    count = sum(p.numel() for p in model.parameters())
    outcome.at_most(f"int8 quantize + freeze of {count / 1e6:.0f} M weights, in copies of them", found, COPIES)


def _row(outcome: Outcome, what: str, rows: int, stats: dict[str, Stats], errors: dict[str, float]) -> None:
    names = ("float", "quanto", "fxquant")
    times = {f"{n} ms": milliseconds(stats[n].median) if n in stats else "" for n in names}
    of_float = f"{ratio(stats, 'float', 'fxquant'):.2f}x"
    of_quanto = f"{ratio(stats, 'quanto', 'fxquant'):.2f}x" if "quanto" in stats else ""
    error = {f"{n} rel. error": f"{errors[n]:.4f}" if n in errors else "" for n in ("quanto", "fxquant")}
    cells = {"what": what, "rows": str(rows), **times, "of float": of_float, "of Quanto": of_quanto, **error}
    outcome.add(cells, what=what, rows=rows, seconds={name: s.as_json() for name, s in stats.items()})


def main(chosen: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    outcome = Outcome("model_door", f"Frozen Linear {SIZE} x {SIZE}, float32, plain eager, one thread")
    linear = nn.Linear(SIZE, SIZE)
    seconds = 0.2 if chosen.quick else 1.5
    weight_only(outcome, linear, seconds)
    dynamic(outcome, linear, seconds)
    quantizing(outcome, 1 if chosen.quick else LAYERS, 1 if chosen.quick else 3)
    return finish(outcome, chosen)


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__).parse_args()))
