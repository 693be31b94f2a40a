"""What passes say of a site, and how they move what belongs to it. The products themselves: `fxquant.products`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxquant.annotation import note_of
from fxquant.graphs import ancestors, source_line, target_name

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


def torch_word(node: Node) -> str:
    """What a node calls, as `target_name` has it and without 'aten.'; '' if that is neither torch's nor an operator.

    So a function of the user's is not taken for the one of torch that has its name.
    """
    if node.op == "call_function" and not _is_known(node.target):
        return ""
    return target_name(node).removeprefix("aten.") if node.op in ("call_function", "call_method") else ""


def _is_known(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    module = getattr(target, "__module__", None)  # torch's functions in C have none
    return not module or module.partition(".")[0] in ("torch", "_operator")


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call that may be given by place or by name."""
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
