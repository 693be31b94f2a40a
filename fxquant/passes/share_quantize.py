"""share-quantize: a value is quantized once, however many products read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.annotation import PassResult, amend_note, note_of
from fxquant.graphs import target_name
from fxquant.passes.base import Pass

_SHAREABLE = ("fxquant.quantize_dynamic", "fxquant.quantize_weight", "fxquant.dequantize", "getitem")


@dataclass(frozen=True)
class ShareQuantize(Pass):
    """Let equal quantize and dequantize nodes be one.

    before:  a = linear(dequantize(quantize(x)), Wa)   b = linear(dequantize(quantize(x)), Wb)
    after:   d = dequantize(quantize(x))               a = linear(d, Wa)   b = linear(d, Wb)

    What is left for this pass are siblings that could not be joined, and a weight that is used twice.
    """

    name = "share-quantize"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        seen: dict[Any, Node] = {}
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or target_name(node) not in _SHAREABLE:
                continue
            key = (node.target, map_arg(node.args, lambda n: _Ref(n)), str(node.kwargs))
            twin = seen.setdefault(repr(key), node)
            if twin is not node:
                paths = dict.fromkeys((*note_of(twin).paths, *note_of(node).paths))
                amend_note(twin, paths=tuple(paths))
                node.replace_all_uses_with(twin)
                gm.graph.erase_node(node)
                result.changed += target_name(twin).startswith("fxquant.quantize")
        gm.recompile()
        return result


class _Ref:
    """A node as a part of a key: equal by name, which is unique in a graph."""

    def __init__(self, node: Node) -> None:
        self.name = node.name

    def __repr__(self) -> str:
        return f"%{self.name}"
