"""The door from torch.compile: a graph module of Dynamo's becomes a captured graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node

from fxquant.capture.assemble import copied_graph, fill_missing_value, make_canonical, module_around
from fxquant.capture.names import attribute_names, path_from_source
from fxquant.errors import CaptureFailed
from fxquant.graphs import VALUE_KEY, CapturedGraph, CapturedWeight

_STATIC = "_dynamo_static_input_type"
STATIC_MARK = {_STATIC: "unguarded"}  # of an input's tensor_dict
_PARAMETERS = "_param_name_to_source"
_EXAMPLE, _SOURCE = "example_value", "_dynamo_source"
# `grapharg` holds the example tensor itself, and would keep the first parameter set alive.
_DROPPED = (_EXAMPLE, "grapharg")

Names = Mapping[int, tuple[str, ...]]


def from_dynamo(gm: GraphModule, example_inputs: Sequence[Any], names: Names | None = None) -> CapturedGraph:
    """The canonical graph of what Dynamo hands a backend; `gm` itself is not changed.

    `names` maps `id(tensor)` to the model's paths of that tensor. Without it they are derived from Dynamo's sources,
    which lack their prefix after a graph break. The result is called with `example_inputs` (or another set of
    arguments in the same places): parameters and buffers among them are the graph's weights, the rest its inputs.

    Raises:
        CaptureFailed: `example_inputs` do not fit the graph.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise CaptureFailed(
            "a Dynamo graph",
            f"it has {len(placeholders)} placeholders, but {len(example_inputs)} example inputs came with it",
            "Pass the inputs that Dynamo gives the backend.",
        )
    graph, twins = copied_graph(gm)
    found = _find_weights(placeholders, example_inputs, names)
    taken = [str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")]
    for weight, name in zip(found, attribute_names((w.paths[0] for w in found), taken), strict=True):
        weight.name = name
    _move_weights_out(graph, twins, found)
    captured = module_around(graph, {w.name: w.tensor for w in found}, gm)
    for node in graph.nodes:
        _bring_value(node)
    _settle_numbers(graph)
    make_canonical(captured, {w.name: w.paths for w in found}, named=names is not None)
    static = {node for weight in found for node in weight.placeholders}
    return CapturedGraph(
        captured,
        inputs=tuple(i for i, node in enumerate(placeholders) if node not in static),
        weights=tuple(w.described() for w in found),
        argument_count=len(placeholders),
        break_reason=_break_reason(gm),
    )


def back_to_dynamo(gm: GraphModule, positions: Sequence[int], original: GraphModule) -> GraphModule:
    """The graph with the placeholders of Dynamo's own graph: in its order, with its sources and static-input marks.

    `positions`: which of them each placeholder of `gm` is. AOTAutograd takes the result for Dynamo's.
    """
    graph = Graph()
    arguments = []
    for node in original.graph.find_nodes(op="placeholder"):
        arguments.append(graph.node_copy(node))
        if hasattr(node, _SOURCE):
            setattr(arguments[-1], _SOURCE, getattr(node, _SOURCE))
    known = {n: arguments[p] for n, p in zip(gm.graph.find_nodes(op="placeholder"), positions, strict=True)}
    for node in gm.graph.nodes:
        if node not in known:
            known[node] = graph.node_copy(node, known.__getitem__)
    made = GraphModule(gm, graph)
    made.meta = dict(original.meta)
    if hasattr(original, _PARAMETERS):
        setattr(made, _PARAMETERS, getattr(original, _PARAMETERS))
    return made


@dataclass
class _Weight:
    """A parameter or buffer among the arguments: where it stands, and all placeholders that brought it."""

    tensor: torch.Tensor
    position: int
    paths: tuple[str, ...]
    placeholders: list[Node] = field(default_factory=list)
    name: str = ""

    def described(self) -> CapturedWeight:
        meta = {k: v for k, v in self.placeholders[0].meta.items() if k not in _DROPPED}
        return CapturedWeight(self.name, self.paths, self.position, isinstance(self.tensor, nn.Parameter), meta)


def _find_weights(placeholders: Sequence[Node], inputs: Sequence[Any], names: Names | None) -> list[_Weight]:
    found: dict[int, _Weight] = {}
    for position, (node, tensor) in enumerate(zip(placeholders, inputs, strict=True)):
        if not _is_weight(node, tensor):
            continue
        known = (names or {}).get(id(tensor), ())
        paths = tuple(known) or (_source_path(node),)
        weight = found.setdefault(id(tensor), _Weight(tensor, position, paths))
        weight.placeholders.append(node)
        if not known and paths[0] not in weight.paths:
            weight.paths += paths
    return list(found.values())


def _is_weight(node: Node, tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
        return False
    marks = node.meta.get("tensor_dict") or {}
    return isinstance(tensor, nn.Parameter) or marks.get(_STATIC) is not None


def _source_path(node: Node) -> str:
    source = getattr(node, _SOURCE, None)
    name = getattr(source, "name", None)
    return path_from_source(name) if isinstance(name, str) else str(node.target)


def _move_weights_out(graph: Graph, twins: Mapping[Node, Node], weights: Sequence[_Weight]) -> None:
    """Replace the weights' placeholders by get_attr nodes, behind the placeholders that are left."""
    last = graph.find_nodes(op="placeholder")[-1:]
    for weight in weights:
        with graph.inserting_after(last[-1]):
            node = graph.create_node("get_attr", weight.name)
        last.append(node)
        first = twins[weight.placeholders[0]]
        node.meta = {k: first.meta[k] for k in (_EXAMPLE, "tensor_dict", "stack_trace") if k in first.meta}
        for placeholder in weight.placeholders:
            twins[placeholder].replace_all_uses_with(node)
            graph.erase_node(twins[placeholder])


def _bring_value(node: Node) -> None:
    if _EXAMPLE in node.meta:
        node.meta[VALUE_KEY] = node.meta[_EXAMPLE]
    for key in _DROPPED:
        node.meta.pop(key, None)
    if node.op in ("call_function", "call_method", "call_module"):
        fill_missing_value(node)


def _settle_numbers(graph: Graph) -> None:
    """Numbers that Dynamo took for symbols and then settled, such as the scale that attention is given, as constants.

    Dynamo guards them already; a later trace knows nothing of it, and would meet a number that no input tells.
    """
    for node in list(graph.nodes):
        value = node.meta.get(VALUE_KEY)
        if node.op == "placeholder" or not isinstance(value, (torch.SymInt, torch.SymFloat)):
            continue
        settled = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else value.node.maybe_as_float()
        if settled is not None:
            node.replace_all_uses_with(settled)
            graph.erase_node(node)


def _break_reason(gm: GraphModule) -> str:
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    words = next((line.strip() for line in str(reason.reason).splitlines() if line.strip()), "graph break")
    frames = list(reason.user_stack or ())
    return f"{words} at {frames[-1].filename}:{frames[-1].lineno}" if frames else words
