"""Sites: the canonical products that passes talk about, and how their parts are found."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import note_of
from fxquant.graphs import ancestors, source_line

LINEAR = torch.ops.aten.linear.default


def linears(gm: GraphModule) -> Iterator[Node]:
    """Every canonical linear, in graph order."""
    yield from gm.graph.find_nodes(op="call_function", target=LINEAR)


def activation_of(linear: Node) -> Node:
    x = linear.args[0]
    assert isinstance(x, Node)
    return x


def weight_of(linear: Node) -> Node:
    weight = linear.args[1]
    assert isinstance(weight, Node)
    return weight


def bias_of(linear: Node) -> Node | None:
    bias = linear.args[2] if len(linear.args) > 2 else None
    assert bias is None or isinstance(bias, Node)
    return bias


def where(node: Node) -> str:
    """How a report names a site: its module path, else its source line, else the node."""
    return note_of(node).path or source_line(node) or node.name


def place_before(nodes: list[Node], point: Node) -> None:
    """Move constant expressions (and what they are computed from) in front of `point`, keeping their order."""
    for node in ancestors(nodes):
        if node > point:
            point.prepend(node)
