"""After the choice of kernels: their configurations, from what tuning knows, or measured now."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.annotation import amend_note, note_of
from fxquant.graphs import is_ours, target_name, value_of
from fxquant.lowering.calls import PLAN, problem_of_call, rows_of
from fxquant.lowering.plans import choice_of
from fxquant.lowering.site import QuantizedSite, quantized_sites
from fxquant.ops import gpu
from fxquant.target import Problem, Target
from fxquant.tuning import Effort, caches_of, lookup, tuner_for
from fxquant.tuning.cpu import ISA, number_of, words_of


@dataclass(frozen=True)
class Call:
    """A node that runs one of fxquant's kernels, and what it is asked to do."""

    node: Node
    problem: Problem


@dataclass(frozen=True)
class Heard:
    """What graphs that are lowered meanwhile would have tuned; filled by them.

    of_sites: for a GPU that is not here: problems of quantized sites, instead of those of the kernels chosen for them.
    """

    of_sites: bool
    problems: list[Problem] = field(default_factory=list)


# Graphs are lowered deep inside torch.compile, to which `fxquant.tune` cannot hand a list.
HEARD: ContextVar[Heard | None] = ContextVar("fxquant_heard", default=None)


def use_tuned(gm: GraphModule, target: Target, autotune: str = "none") -> int:
    """Give each kernel of the graph its tuned configuration, in its arguments and its note; returns how many changed.

    before:  int8_linear_dynamic(x, packed, scale, b, 768)           kernel=int8_linear_dynamic
    after:   int8_linear_dynamic(x, packed, scale, b, 768, 2)        kernel=int8_linear_dynamic isa=avx2 (tuned)

    `autotune` "quick" or "full": problems that the cache does not hold are measured first, and a node with a plan, that
    the choice of kernels looked up, gets that of its problem anew; "none": nothing is measured, and a node of which
    nothing is known stays as it is. The kernel of a frozen module has no plan until here.
    """
    heard = HEARD.get()
    if heard is not None and not heard.of_sites and _is_tunable(target):
        heard.problems.extend(call.problem for call in calls_of(gm, target))
    if autotune == "none" and not (target.runs_triton or _knows(target)):
        return 0
    calls = list(calls_of(gm, target)) if _is_tunable(target) else []
    if autotune == "none" and target.runs_triton:
        calls = [call for call in calls if _has_no_plan(call.node)]
    if autotune != "none" and calls:
        tuner_for(target).tune([call.problem for call in calls], cast("Effort", autotune))
        gpu.forget_plans()
    changed = sum(_configure(call, target) for call in calls)
    if changed:
        gm.recompile()
    return changed


def tell_problems(gm: GraphModule) -> None:
    """For `Heard.of_sites`: what a GPU would be asked by the sites of a graph whose kernels are not chosen yet."""
    heard = HEARD.get()
    if heard is not None and heard.of_sites:
        for site in quantized_sites(gm):
            heard.problems.extend(_problems_of(site))


def _problems_of(site: QuantizedSite) -> Iterator[Problem]:
    weight, dtype = site.weight, str(site.dtype).removeprefix("torch.")
    sizes = (weight.out_features, weight.in_features, str(weight.spec))
    if site.kind == "embedding":
        yield Problem("embedding", rows_of(value_of(site.x).shape), *sizes, "", dtype)
    elif site.kind == "linear":
        m, codes = rows_of(value_of(site.x).shape[:-1]), str(site.spec.activations or "")
        yield Problem("linear", m, *sizes, codes, dtype)
        if codes:
            yield Problem("quantize", m, 0, weight.in_features, "", codes, dtype)


def _knows(target: Target) -> bool:
    return target.has_kernels and any(cache.read() for cache in caches_of(target))


def calls_of(gm: GraphModule, target: Target) -> Iterator[Call]:
    """Every node of the graph whose kernel can be tuned, in graph order."""
    for node in gm.graph.nodes:
        if not is_ours(node):
            continue
        name = target_name(node).removeprefix("fxquant.")
        if problem := problem_of_call(name, map_arg(_arguments(node), value_of), target.device):
            yield Call(node, problem)


def _is_tunable(target: Target) -> bool:
    return target.runs_triton or (target.device == "cpu" and target.has_kernels)


def _configure(call: Call, target: Target) -> bool:
    node, plan = call.node, lookup(call.problem, target)
    if not plan.rows:
        return False
    row = plan.row(call.problem.m)
    names = _names(node)
    if PLAN in names:
        choice = choice_of(plan, call.problem.m, target)
        _set(node, names.index(PLAN), list(choice.ints))
        words = choice.words
    elif ISA in names and row.source != "heuristic":
        _set(node, names.index(ISA), number_of(row.config))
        words = f"{words_of(row.config)} ({row.source})"
    else:
        return False
    before = note_of(node).kernel
    if before or PLAN in names:
        fused = [word for word in before.split() if word.startswith("+")]  # what the kernel does beside the product
        amend_note(node, kernel=" ".join([words, *fused]))
    return True


def _has_no_plan(node: Node) -> bool:
    return _arguments(node).get(PLAN) in ((), [])


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments that were given, by name."""
    return {**dict(zip(_names(node), node.args, strict=False)), **node.kwargs}


def _names(node: Node) -> list[str]:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def _set(node: Node, place: int, value: Any) -> None:
    args = list(node.args)
    assert len(args) >= place, "arguments before it have no default"
    args[place : place + 1] = [value]
    node.args = tuple(args)
