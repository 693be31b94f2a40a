"""Lowering without a compiler: kernels are asked for by the target, and the ops' references run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.graphs import CapturedGraph
from fxquant.lowering import Binding, Packed, bind, select_kernels
from fxquant.spec import QuantConfig
from fxquant.target import Target
from fxquant.weights import WeightStore
from tests.passes.helpers import staged

CPU = Target("cpu", avx2=True, avx512=True, vnni=True, has_kernels=True)
NO_KERNEL = Target("cpu")


def selected(
    model: Callable[..., Any], *inputs: Any, config: QuantConfig | str = "int8dq", target: Target = CPU, **options: Any
) -> CapturedGraph:
    """The graph with kernels chosen, weights still its attributes."""
    captured = staged(model, *inputs, config=config, **options)
    select_kernels(captured.gm, target)
    return captured


def bound(model: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[CapturedGraph, Binding, list[Any]]:
    """The lowered graph, how it is called, and the arguments that the captured graph's weights stand for."""
    captured = selected(model, *inputs, **options)
    args = original_arguments(captured, inputs)
    return captured, bind(captured.gm, captured), args


def original_arguments(captured: CapturedGraph, inputs: Any) -> list[Any]:
    """The flat arguments that Dynamo would pass: inputs and weights in their places."""
    args: list[Any] = [None] * captured.argument_count
    for position, value in zip(captured.inputs, inputs, strict=True):
        args[position] = value
    for weight in captured.weights:
        args[weight.position] = getattr(captured.gm, weight.name)
    return args


def call_bound(gm: torch.fx.GraphModule, binding: Binding, args: list[Any]) -> Any:
    """Run the lowered graph on the original arguments, weights packed by a store of its own."""
    with torch.no_grad():
        return gm(*arguments_of(binding, args, WeightStore()))


def arguments_of(binding: Binding, args: list[Any], store: WeightStore) -> list[Any]:
    """The lowered graph's arguments for a call with the original ones."""
    entries = [store.entry(r.recipe, [args[p] for p in r.sources], r.folded) for r in binding.recipes]
    return [
        entries[taken.recipe].tensors[taken.output] if isinstance(taken, Packed) else args[taken.position]
        for taken in binding.arguments
    ]


def targets(gm: torch.fx.GraphModule) -> list[str]:
    """The fxquant ops of the graph, in order, without their namespace."""
    return [n.target._schema.name.split("::")[1] for n in gm.graph.nodes if _is_ours(n)]


def _is_ours(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxquant"


def tensors_of(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors_of(v)]
