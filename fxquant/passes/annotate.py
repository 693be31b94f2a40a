"""annotate: write on each product what the configuration wants for it, or why it stays float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult, amend_note, note_of
from fxquant.graphs import ancestors, constant_nodes, target_name, value_of, written_nodes
from fxquant.passes.base import Pass
from fxquant.passes.sites import where
from fxquant.products import FAKE_QUANTIZE_WEIGHT, FROZEN, Form, Kind, bias_of, products, weight_of, weight_op
from fxquant.spec import Decision, TensorSpec

_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Annotate(Pass):
    """Give every canonical product its spec; later passes only read it.

    before:  y = linear(x, @w)
    after:   y = linear(x, @w)      {w=int8/channel x=int8/token}

    `decide` answers for a module path (or for several, if a shared weight has more than one) and the kind of product:
    linear, conv or embedding. A product of a quantized module is left as it is; one whose frozen weight is decoded at
    each call has the decoding op for its kernel. `training`: insert-fake-quantize speaks of those that are not frozen.
    """

    decide: Callable[[tuple[str, ...], Kind], Decision]
    training: bool = False
    name = "annotate"

    def run(self, gm: GraphModule) -> PassResult:
        result, graph = PassResult(), _Graph.of(gm)
        for node, form in products(gm):
            op = weight_op(node)
            if op is not None and target_name(op) == FAKE_QUANTIZE_WEIGHT and self.training:
                continue
            if why := graph.why_not(node, form) or _of_model_door(node, op):
                amend_note(node, reason=why)
                result.declined.append(Declined(where(node), why, node.name))
                continue
            spec, reason = self.decide(note_of(node).paths, form.kind)
            if spec is not None and spec.weights is not None and (why := _why_unfit(node, form, spec.weights)):
                spec, reason = None, why
            amend_note(node, spec=spec, reason=reason)
            if spec is None:
                result.declined.append(Declined(where(node), reason, node.name))
            else:
                result.changed += 1
        return result


@dataclass(frozen=True)
class _Graph:
    """What is known of the graph's values: constants, those written to, those that some weight is computed from."""

    constant: set[Node]
    written: set[Node]
    in_weights: set[Node]

    @staticmethod
    def of(gm: GraphModule) -> _Graph:
        constant = constant_nodes(gm)
        weights = [weight for node, _ in products(gm) if (weight := weight_of(node)) in constant]
        return _Graph(constant, written_nodes(gm), set(ancestors(weights)))

    def why_not(self, node: Node, form: Form) -> str:
        """Why the product cannot be quantized, whatever the configuration says; empty if it can."""
        weight, bias = weight_of(node), bias_of(node)
        w = value_of(weight)
        if weight not in self.constant:
            return f"the weight is computed from an activation (at {weight.name})"
        if weight in self.written or bias in self.written:
            return "the model writes to the weight while it runs"
        if node in self.in_weights:
            return "its result is the weight of another product, which is quantized as a whole"
        if w.dtype not in _FLOAT:
            return f"the weight is {w.dtype}: float32, bfloat16 or float16 is needed"
        if w.dim() not in form.ranks:
            wanted = " or ".join(map(str, form.ranks))
            return f"the weight has {w.dim()} dimensions, {form.word} wants {wanted}"
        if not all(isinstance(size, int) for size in w.shape) or 0 in w.shape:
            return f"the weight's shape {tuple(w.shape)} is empty or not fixed"
        return ""


def _of_model_door(node: Node, op: Node | None) -> str:
    """Why a product of a quantized module is left; `op` makes its weight. Empty for any other product."""
    if op is None:
        return ""
    if target_name(op) == FAKE_QUANTIZE_WEIGHT:
        return "quantized by the model door; freeze it"
    amend_note(node, kernel=target_name(op).removeprefix("fxquant."))
    return FROZEN


def _why_unfit(node: Node, form: Form, spec: TensorSpec) -> str:
    """Why a weight of this shape cannot have that spec; a convolution's is [O, all the rest]."""
    w = value_of(weight_of(node))
    shape = [w.shape[0], w[0].numel()] if form.kind == "conv" else list(w.shape)
    problem = spec.granularity.unfit(shape)
    return f"the weight cannot be {spec}: {problem}" if problem else ""
