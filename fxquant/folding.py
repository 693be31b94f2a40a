"""Constant expressions: what a graph computes from its parameters alone, cut out to run once per weight set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graphs import VALUE_KEY, target_name, value_of

_FOLDED = "fxquant_folded"
_EXPRESSIONS = "fxquant_expressions"


@dataclass(frozen=True, eq=False)
class FoldedConstant:
    """Tensors of the graph that come from parameters, and how.

    ``expression(*sources)`` gives a tuple, one tensor for each of ``names`` (attributes of the graph module);
    ``sources`` are the attribute names of the parameters, in the order that the expression takes them. ``key`` is
    the expression as text, the same in every graph that computes the same: two graphs of one model share by it.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    expression: GraphModule
    key: str


def folded_constants(gm: GraphModule) -> dict[str, FoldedConstant]:
    """The folded constants of a graph, by the attribute that holds them."""
    return gm.meta.setdefault(_FOLDED, {})


def fold(gm: GraphModule, outputs: Sequence[Node], names: Sequence[str], *, evaluate: bool) -> list[Node]:
    """Replace constant nodes by buffers that hold their values; returns the new get_attr nodes.

    With `evaluate` the buffers are computed from the parameters that the graph holds now, so that the graph runs;
    without it they hold fake tensors (the caller will compute them later, through the weight store).
    """
    folded = _cut_out(gm, outputs, tuple(_unique_name(gm, name) for name in names))
    if evaluate:
        with torch.no_grad():
            tensors = folded.expression(*(getattr(gm, name) for name in folded.sources))
    else:
        tensors = [value_of(node) for node in outputs]
    readers = {user for node in outputs if node.op != "get_attr" for user in node.users}
    made = []
    for node, name, tensor in zip(outputs, folded.names, tensors, strict=True):
        gm.register_buffer(name, tensor)
        folded_constants(gm)[name] = folded
        with gm.graph.inserting_before(node):
            attribute = gm.graph.get_attr(name)
        attribute.meta = {k: v for k, v in node.meta.items() if k != "nn_module_stack"}
        # A parameter that goes in as it is stays what it is to others, who may be folded as well.
        node.replace_all_uses_with(attribute, lambda user, node=node: node.op != "get_attr" or user in readers)
        made.append(attribute)
    return made


def _cut_out(gm: GraphModule, outputs: Sequence[Node], names: tuple[str, ...]) -> FoldedConstant:
    order = _in_order_of_use(outputs)
    sources = [node for node in order if node.op == "get_attr"]
    graph = Graph()
    copies: dict[Node, Node] = {}
    words = []
    for index, source in enumerate(sources):
        copies[source] = graph.placeholder(f"p{index}")
        copies[source].meta[VALUE_KEY] = value_of(source)
    for node in order:
        if node.op == "get_attr":
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        numbers = {n: i for i, n in enumerate(copies)}
        words.append(f"{target_name(node)}{_text(node, numbers)}")
    graph.output(tuple(copies[n] for n in outputs))
    numbers = {n: i for i, n in enumerate(copies)}
    key = "; ".join([*words, "-> " + ",".join(f"%{numbers[n]}" for n in outputs)])
    values = tuple((value.dtype, str(value.shape)) for value in map(value_of, sources))
    # A GraphModule compiles Python code of its own: equal layers share one.
    expressions = gm.meta.setdefault(_EXPRESSIONS, {})
    expression = expressions.get((key, values)) or expressions.setdefault((key, values), GraphModule({}, graph))
    return FoldedConstant(names, tuple(str(s.target) for s in sources), expression, key)


def _in_order_of_use(outputs: Sequence[Node]) -> list[Node]:
    """The outputs and all that they come from, operands first: an order in which the rest of the graph has no say."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        for operand in node.all_input_nodes:
            if operand not in order:
                visit(operand)
        order[node] = None

    for output in outputs:
        visit(output)
    return list(order)


def _text(node: Node, numbers: dict[Node, int]) -> str:
    def word(n: Node) -> str:
        return f"%{numbers[n]}"

    return f"{map_arg(node.args, word)}{map_arg(node.kwargs, word) or ''}"


def _unique_name(gm: GraphModule, wanted: str) -> str:
    name = re.sub(r"[\W_]+", "_", wanted).strip("_") or "folded"
    name = f"_{name}" if name[0].isdigit() else name
    taken, number = name, 1
    while hasattr(gm, taken):
        taken, number = f"{name}_{number}", number + 1
    return taken
