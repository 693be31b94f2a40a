"""What both doors do: a module of its own around the copied graph, weights by name, then the canonical form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxquant.capture.attention import take_attention_apart
from fxquant.capture.editor import Editor, ModelPaths, write_first_notes
from fxquant.capture.model_door import recognize_kernels, spell_ops_out
from fxquant.capture.products import make_products_canonical
from fxquant.graphs import VALUE_KEY, infer_value, value_of


def copied_graph(gm: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """A copy of the graph with meta dictionaries of its own, which share the fake values; and old node → new node."""
    graph = Graph()
    twins: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, twins)
    old_output = next(iter(gm.graph.find_nodes(op="output")))
    graph.output(output).meta = dict(old_output.meta)
    return graph, twins


def module_around(graph: Graph, tensors: Mapping[str, torch.Tensor], original: GraphModule) -> GraphModule:
    """A GraphModule with the tensors registered as they are, and with whatever else the graph reads of `original`."""
    attributes: dict[str, Any] = dict(tensors)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in attributes:
            attributes[node.target] = attrgetter(node.target)(original)
    return GraphModule(attributes, graph)


def make_canonical(gm: GraphModule, paths: Mapping[str, Sequence[str]], named: bool) -> None:
    """Bring a captured module to the canonical form in place; `paths` are the weights' by attribute name."""
    write_first_notes(gm)
    editor = Editor(gm, ModelPaths({name: tuple(p) for name, p in paths.items()}, named))
    spell_ops_out(editor)  # first: by their overloads all later questions know them
    take_attention_apart(editor)
    make_products_canonical(editor)
    recognize_kernels(editor)
    gm.graph.lint()
    gm.recompile()


def fill_missing_value(node: Node) -> None:
    """Give a call without a value the one that it computes, or None if it computes none (a mode switch)."""
    if VALUE_KEY in node.meta:
        return
    values = [value_of(n) for n in node.all_input_nodes]
    fake = next((v for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)
    node.meta[VALUE_KEY] = None
    if fake is not None and all(v is not None for v in values) and node.op in ("call_function", "call_method"):
        try:
            node.meta[VALUE_KEY] = infer_value(node, fake.fake_mode)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return
