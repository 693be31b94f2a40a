"""The way from a captured graph to a lowered one: the page that reads straight down."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from fxquant import verify
from fxquant.annotation import PassResult
from fxquant.graphs import CapturedGraph, is_ours
from fxquant.lowering import Binding, bind, no_triton_kernel, select_kernels
from fxquant.lowering.tuned import tell_problems, use_tuned
from fxquant.passes import (
    Annotate,
    FoldWeights,
    FuseAttention,
    FuseEpilogues,
    FuseGates,
    FuseNorms,
    FusePrologues,
    FuseRotary,
    FuseSiblings,
    InsertFakeQuantize,
    InsertQdq,
    Observer,
    Pass,
    ShareOperands,
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


def kernel_pipeline(config: QuantConfig, target: Target) -> tuple[Pass, ...]:
    """The passes between the choice of kernels and the binding of weights: what kernels do beside the product."""
    if not config.fuse:
        return ()
    if not target.runs_triton:
        if not target.has_kernels:
            return ()
        return (
            FuseGates(),  # first: what makes both halves of a gated product writes half as much
            FusePrologues(),  # before epilogues: an activation in front of a gate belongs to the product that reads it
            FuseEpilogues(),
            FuseRotary(),  # before attention, which reads what it makes
            FuseAttention(),
            ShareOperands(),
        )
    return (
        FuseEpilogues(),  # on kernels only: torch's own linear takes neither activation nor residual
        FuseNorms(functools.partial(no_triton_kernel, arch=target.arch)),  # what a graph quantizes is settled by now
    )


def training_pipeline(decide: Decide) -> tuple[Pass, ...]:
    """The passes of training, in order. Siblings stay apart: joining changes no number, and no kernel would gain."""
    return (
        Annotate(decide, training=True),  # the same policy, so that what is trained is what inference will run
        InsertFakeQuantize(),  # from here on the graph computes the quantized model, in float
        ShareQuantize(),  # one rounding of a value that several products read
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
    leave_float: bool = False,
) -> Lowered:
    """Quantize and lower a captured graph. The graph is edited in place: pass ``captured.copy()`` to keep it.

    `leave_float`: the graph is part of a model with quantized modules, which left its other products float.

    Raises:
        PassFailed: a pass raised.
        VerificationFailed: a stage broke its contract.
        UnloweredSite: ``config.strict``, and a site found no kernel.
    """
    gm, before = captured.gm, snapshot(captured)
    watch = _Stopwatch(observe)
    verify.captured(gm)
    watch("capture", gm, None)
    policy = _policy(gm, config, decide, leave_float, target)
    results = run_passes(gm, pipeline_for(config, policy, evaluate=evaluate), observe=watch, runnable=evaluate)
    verify.quantized(gm)
    tell_problems(gm)
    results["lower"] = select_kernels(gm, target)
    results |= run_passes(gm, kernel_pipeline(config, target), observe=watch, runnable=evaluate)
    use_tuned(gm, target, config.autotune)
    binding = bind(gm, captured)
    verify.lowered(gm, strict=config.strict)
    watch("lower", gm, results["lower"])
    return Lowered(gm, binding, GraphReport.of(name, before, gm, results, seconds=watch.seconds))


def train_graph(
    captured: CapturedGraph,
    config: QuantConfig,
    decide: Decide,
    *,
    name: str = "graph",
    observe: Observer = ignore,
    leave_float: bool = False,
) -> Lowered:
    """Make a captured graph, in place, compute the quantized model with gradients; its binding has originals only.

    Raises:
        PassFailed: a pass raised.
        VerificationFailed: a stage broke its contract.
    """
    gm, before = captured.gm, snapshot(captured)
    watch = _Stopwatch(observe)
    verify.captured(gm)
    watch("capture", gm, None)
    policy = _policy(gm, config, decide, leave_float)
    results = run_passes(gm, training_pipeline(policy), observe=watch, runnable=observe is not ignore)
    verify.trainable(gm)
    binding = bind(gm, captured)
    return Lowered(gm, binding, GraphReport.of(name, before, gm, results, seconds=watch.seconds))


_SLOWER = "the default, int8dq, would be slower than float: no fast int8 kernel on {}; name a preset"
_LEFT = "left float by the model door"


def _policy(
    gm: GraphModule, config: QuantConfig, decide: Decide, leave_float: bool, target: Target | None = None
) -> Decide:
    """`decide`, unless nobody asked this door for a format, and there is a reason to leave float what is float.

    Quantized modules had a recipe, which left the rest float. On a `target` without a kernel for the default, quantized
    would only be slower.
    """
    if config.asks_for_something:
        return decide
    reason = _LEFT if leave_float or any(map(is_ours, gm.graph.nodes)) else ""
    if not reason and target is not None and not target.runs_default:
        reason = _SLOWER.format(target.device)
    return (lambda paths, kind: Decision(None, reason)) if reason else decide


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
