"""Folding by the kernel: weights that are int8 by rows are quantized in one pass over them instead of ten."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from fxquant.graphs import value_of
from fxquant.lowering.site import QUANTIZE_WEIGHT
from fxquant.ops.checks import ACTIVATION_DTYPES

QUANTIZE_ROWS = torch.ops.fxquant.int8_quantize_per_token.default
_CAT = torch.ops.aten.cat.default


def quantizes(expression: GraphModule) -> bool:
    """Whether the constant expression quantizes a weight."""
    return bool(expression.graph.find_nodes(op="call_function", target=QUANTIZE_WEIGHT))


def quantize_rows_by_kernel(expression: GraphModule) -> GraphModule:
    """A copy of a constant expression with its int8 weights given to the kernel of activations; the bits are the same.

    before:  codes, scale = quantize_weight(cat(q, k), "int8/channel")
    after:   (qc, qs), (kc, ks) = int8_quantize_per_token(q), int8_quantize_per_token(k)
             codes, scale = cat(qc, kc), cat(qs, ks)

    A channel of a matrix is a row, as a token is. Rows know nothing of each other, so that they can be joined as codes:
    a quarter of the bytes.
    """
    graph = Graph()
    graph.output(graph.graph_copy(expression.graph, {}))
    for node in graph.find_nodes(op="call_function", target=QUANTIZE_WEIGHT):
        weight, spec, *algorithm = node.args
        assert isinstance(weight, Node)
        value = value_of(weight)
        plain = spec == "int8/channel" and algorithm in ([], ["auto"], ["absmax"])
        if not plain or value.dim() != 2 or value.dtype not in ACTIVATION_DTYPES:
            continue
        with graph.inserting_before(node):
            made = _rows(graph, weight)
        for part in list(node.users):
            part.replace_all_uses_with(made[cast(int, part.args[1])])
        graph.eliminate_dead_code()
    return GraphModule({}, graph)


def _rows(graph: Graph, weight: Node) -> tuple[Node, Node]:
    """Codes and scale."""
    joined = weight.target is _CAT and weight.args[1:] in ((), (0,))
    weights = cast("list[Node]", weight.args[0]) if joined else [weight]  # one may be there twice
    pairs = [graph.call_function(QUANTIZE_ROWS, (w,)) for w in weights]
    codes, scales = ([graph.call_function(operator.getitem, (pair, i)) for pair in pairs] for i in (0, 1))
    if not joined:
        return codes[0], scales[0]
    return graph.call_function(_CAT, (codes,)), graph.call_function(_CAT, (scales,))
