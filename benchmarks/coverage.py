"""docs/models.md: what fxquant makes of well-known architectures, each small and of random weights from its config.

python -m benchmarks.coverage [--write docs/models.md]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import fxquant
from benchmarks.harness import Error, Outcome, arguments, finish, progress
from benchmarks.table import markdown, write
from tests.integrations.small_models import MODELS, answer, made, model_class

PRESETS = ("int8wo", "int8dq", "fp8wo", "fp8dqrow", "int4wo", "int4dq", "fp6_e3m2", "nvfp4wo")
# Compiled, a norm's sums are added in another order. (Of the first preset, which rounds no activations.)
COMPILED_AGREES = 1e-3
FAMILIES = tuple(name for name in MODELS if name != "tied")
MARK = "models"


@dataclass(frozen=True)
class Graphs:
    """What Dynamo made of one call: how many graphs, and for what reasons it broke off."""

    count: int
    breaks: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """One architecture.

    share       of the numbers in weight matrices but embedding tables, 0 to 1, that is quantized; left: what is not.
    sqnr        of the first output by preset, in dB.
    differs     the quantized model compiled from itself in eager: |difference| / |answer|.
    """

    name: str
    share: float
    left: tuple[str, ...]
    sqnr: dict[str, float]
    float_graphs: Graphs
    graphs: Graphs
    differs: float


def graphs_of(model: Any, **compile_kwargs: Any) -> tuple[Graphs, torch.Tensor]:
    """The graphs of one call of the model, and its answer."""
    torch._dynamo.reset()
    counters.clear()
    result = answer(model, torch.compile(model, **compile_kwargs))
    return Graphs(counters["stats"]["unique_graphs"], tuple(counters["graph_break"])), result


def quantized(name: str, preset: str) -> tuple[Any, fxquant.QuantizeReport]:
    """The small model, quantized and frozen."""
    model = made(name)
    report = fxquant.quantize(model, preset)
    fxquant.freeze(model)
    return model, report


def measure(name: str, presets: Iterable[str] = PRESETS) -> Coverage:
    """Quantize the model of that name in each preset, and compile the first of them."""
    want = answer(made(name))
    models = {preset: quantized(name, preset) for preset in presets}
    sqnr = {preset: Error.of(answer(model), want).sqnr for preset, (model, _) in models.items()}
    first, report = next(iter(models.values()))
    graphs, compiled = graphs_of(first, backend="fxquant", options={"executor": "eager"})
    return Coverage(
        name=model_class(name).__name__,
        share=report.linear_share,
        left=tuple(row.path for row in report.skipped if row.kind != "embedding"),
        sqnr=sqnr,
        float_graphs=graphs_of(made(name), backend="eager")[0],
        graphs=graphs,
        differs=Error.of(compiled, answer(first)).relative,
    )


def row(found: Coverage) -> dict[str, str]:
    left = ", ".join(sorted({".".join("*" if p.isdigit() else p for p in path.split(".")) for path in found.left}))
    return {
        "model": found.name,
        "quantized": f"{found.share:.1%}",
        "left float": left,
        "graph breaks (float)": f"{len(found.graphs.breaks)} ({len(found.float_graphs.breaks)})",
        **{preset: f"{value:.1f}" for preset, value in found.sqnr.items()},
    }


def main(chosen: argparse.Namespace) -> int:
    outcome = Outcome("coverage", "Small models of random weights: share quantized, graph breaks, SQNR in dB by preset")
    for name in FAMILIES:
        progress(name)
        found = measure(name, PRESETS[:2] if chosen.quick else PRESETS)
        outcome.add(row(found), share=found.share, sqnr=found.sqnr, breaks=found.graphs.breaks, differs=found.differs)
        more = len(found.graphs.breaks) - len(found.float_graphs.breaks)
        outcome.demand(f"{found.name}: graph breaks beyond the float model's", more <= 0, str(more), "none")
        close = found.differs <= COMPILED_AGREES
        outcome.demand(
            f"{found.name}: compiled against eager", close, f"{found.differs:.1e}", f"<= {COMPILED_AGREES:g}"
        )
    if chosen.write:
        write(chosen.write, MARK, markdown(list(outcome.rows[0]), [list(one.values()) for one in outcome.rows]))
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--write", type=Path, help="put the table into this page")
    sys.exit(main(parser.parse_args()))
