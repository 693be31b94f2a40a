"""annotate: write on each product what the configuration wants for it, or why it stays float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult, amend_note, note_of
from fxquant.graphs import constant_nodes, value_of, written_nodes
from fxquant.passes.base import Pass
from fxquant.passes.sites import bias_of, linears, weight_of, where
from fxquant.spec import Decision

_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Annotate(Pass):
    """Give every canonical product its spec; later passes only read it.

    before:  y = linear(x, @w)
    after:   y = linear(x, @w)      {w=int8/channel x=int8/token}

    `decide` answers for a module path (or for several, if a shared weight has more than one).
    """

    decide: Callable[[tuple[str, ...]], Decision]
    name = "annotate"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        constant, written = constant_nodes(gm), written_nodes(gm)
        for node in linears(gm):
            if why := _why_not(node, constant, written):
                amend_note(node, reason=why)
                result.declined.append(Declined(where(node), why, node.name))
                continue
            decision = self.decide(note_of(node).paths)
            amend_note(node, spec=decision.spec, reason=decision.reason)
            if decision.spec is None:
                result.declined.append(Declined(where(node), decision.reason, node.name))
            else:
                result.changed += 1
        return result


def _why_not(node: Node, constant: set[Node], written: set[Node]) -> str:
    weight, bias = weight_of(node), bias_of(node)
    w = value_of(weight)
    if weight not in constant:
        return f"the weight is computed from an activation (at {weight.name})"
    if weight in written or bias in written:
        return "the model writes to the weight while it runs"
    if w.dtype not in _FLOAT:
        return f"the weight is {w.dtype}: float32, bfloat16 or float16 is needed"
    if w.dim() != 2:
        return f"the weight has {w.dim()} dimensions, a linear wants 2"
    if not all(isinstance(size, int) for size in w.shape) or 0 in w.shape:
        return f"the weight's shape {tuple(w.shape)} is empty or not fixed"
    return ""
