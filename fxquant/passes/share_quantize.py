"""share-quantize: a value is quantized once, however many products read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.annotation import PassResult, amend_note, note_of
from fxquant.graphs import target_name, written_by
from fxquant.passes.base import Pass
from fxquant.passes.insert_fake_quantize import InsertFakeQuantize
from fxquant.passes.insert_qdq import InsertQdq

_MAKERS = {InsertQdq.name, InsertFakeQuantize.name}
_QUANTIZE = ("quantize_dynamic", "quantize_weight", "fake_quantize", "fake_quantize_weight")


@dataclass(frozen=True)
class ShareQuantize(Pass):
    """Let equal quantize and dequantize nodes be one.

    before:  a = linear(dequantize(quantize(x)), Wa)   b = linear(dequantize(quantize(x)), Wb)
    after:   d = dequantize(quantize(x))               a = linear(d, Wa)   b = linear(d, Wb)

    What is left for this pass are siblings that could not be joined, and a weight that is used twice: by a module that
    is called twice, or by an embedding and the head tied to it.
    """

    name = "share-quantize"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        seen: dict[Any, Node] = {}
        for node in list(gm.graph.nodes):
            if written_by(node):
                seen.clear()  # the same node may stand for another value from here on
            if not _is_ours(node):
                continue
            twin = seen.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
            if twin is not node:
                paths = dict.fromkeys((*note_of(twin).paths, *note_of(node).paths))
                amend_note(twin, paths=tuple(paths))
                node.replace_all_uses_with(twin)
                gm.graph.erase_node(node)
                result.changed += target_name(twin).removeprefix("fxquant.") in _QUANTIZE
        return result


def _is_ours(node: Node) -> bool:
    """A node that a pass made of a value: quantize, an element of what it gives, a flattened weight, dequantize."""
    return node.op == "call_function" and not _MAKERS.isdisjoint(note_of(node).made_by)
