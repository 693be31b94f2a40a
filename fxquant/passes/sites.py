"""What passes say of a site, and how they move what belongs to it. The products themselves: `fxquant.products`."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxquant.annotation import note_of
from fxquant.graphs import ancestors, source_line

_TO_COPY, _CAPTURE = torch.ops.aten._to_copy.default, "capture"


def where(node: Node) -> str:
    """How a report names a site: its module path, else its source line, else the node."""
    return note_of(node).path or source_line(node) or node.name


def place_before(nodes: list[Node], point: Node) -> None:
    """Move constant expressions (and what they are computed from) in front of `point`, keeping their order."""
    for node in ancestors(nodes):
        if node > point:
            point.prepend(node)


def uncast(weight: Node) -> Node:
    """The weight before capture spelled autocast out: codes are of the parameter, and decode to the narrow dtype."""
    if weight.target is not _TO_COPY or _CAPTURE not in note_of(weight).made_by:
        return weight
    (source,) = weight.all_input_nodes
    return source
