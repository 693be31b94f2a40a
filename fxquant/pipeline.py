"""The way from a captured graph to a lowered one: the page that reads straight down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from fxquant import verify
from fxquant.annotation import PassResult
from fxquant.graphs import CapturedGraph
from fxquant.lowering import Binding, bind, select_kernels
from fxquant.passes import (
    Annotate,
    FoldWeights,
    FuseSiblings,
    InsertQdq,
    Observer,
    Pass,
    ShareQuantize,
    ignore,
    run_passes,
)
from fxquant.products import Kind
from fxquant.report import GraphReport
from fxquant.report.snapshot import snapshot
from fxquant.spec import Decision, QuantConfig
from fxquant.target import Target

# What a product of that kind gets, by its module paths.
Decide = Callable[[tuple[str, ...], Kind], Decision]


@dataclass(frozen=True)
class Lowered:
    """A graph on kernels: runnable, how it is called, and what was done."""

    gm: GraphModule
    binding: Binding
    report: GraphReport


def pipeline_for(config: QuantConfig, decide: Decide, *, evaluate: bool = True) -> tuple[Pass, ...]:
    """The passes, in the one order in which they work. `evaluate`: fold real codes, so that every stage can run."""
    return (
        Annotate(decide),  # first: policy is written once, all later passes only read it
        *((FuseSiblings(),) if config.fuse else ()),  # before q/dq: afterwards siblings would read different values
        InsertQdq(),  # from here on the graph computes the quantized model
        ShareQuantize(),  # after insert-qdq made one quantize per product; before folding, so that tied codes fold once
        FoldWeights(evaluate),  # last: needs the whole constant expression of a weight, joined siblings included
    )


def quantize_graph(
    captured: CapturedGraph,
    config: QuantConfig,
    decide: Decide,
    *,
    target: Target,
    name: str = "graph",
    observe: Observer = ignore,
    evaluate: bool = True,
) -> Lowered:
    """Quantize and lower a captured graph. The graph is edited in place: pass ``captured.copy()`` to keep it.

    Raises:
        PassFailed: a pass raised.
        VerificationFailed: a stage broke its contract.
        UnloweredSite: ``config.strict``, and a site found no kernel.
    """
    gm, before = captured.gm, snapshot(captured)
    watch = _Stopwatch(observe)
    verify.captured(gm)
    watch("capture", gm, None)
    policy = decide if config.asks_for_something or target.runs_default else _stay_float(target)
    results = run_passes(gm, pipeline_for(config, policy, evaluate=evaluate), observe=watch, runnable=evaluate)
    verify.quantized(gm)
    results["lower"] = select_kernels(gm, target)
    binding = bind(gm, captured)
    verify.lowered(gm, strict=config.strict)
    watch("lower", gm, results["lower"])
    return Lowered(gm, binding, GraphReport.of(name, before, gm, results, seconds=watch.seconds))


def _stay_float(target: Target) -> Decide:
    """The decision where nobody asked for a format and the default has no kernel: quantized would only be slower."""
    reason = f"the default, int8dq, would be slower than float: no fast int8 kernel on {target.device}; name a preset"
    return lambda paths, kind: Decision(None, reason)


class _Stopwatch:
    """An observer that passes on what it sees and notes how long each stage took."""

    def __init__(self, observe: Observer) -> None:
        self._observe = observe
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, gm: GraphModule, result: PassResult | None) -> None:
        self.seconds[stage] = time.perf_counter() - self._last
        self._observe(stage, gm, result)
        self._last = time.perf_counter()
