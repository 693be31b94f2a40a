"""insert-fake-quantize: from here on the graph computes the quantized model, in float and with gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import Declined, PassResult, amend_note, note_of
from fxquant.graphs import add_call, target_name
from fxquant.passes.base import Pass
from fxquant.passes.sites import uncast, where
from fxquant.products import FAKE_QUANTIZE_WEIGHT, Form, activation_of, products, rounded_to, weight_of, weight_op
from fxquant.spec import LinearSpec, TensorSpec

FAKE_QUANTIZE = torch.ops.fxquant.fake_quantize.default
_OF_MODULE = "quantized by the model door: trained as it is"


@dataclass(frozen=True)
class InsertFakeQuantize(Pass):
    """Round the operands of every annotated product; the gradient goes straight through the rounding.

    before:  y = linear(x, @w, b)
    after:   y = linear(fake_quantize(x, "int8/token"), fake_quantize_weight(@w, "int4/group32"), b)

    The values are those that insert-qdq's nodes compute. The weight stays a float tensor that an optimizer changes, so
    nothing is folded. A convolution's weight is rounded as the matrix [O, all the rest]. A product of a quantized
    module that is not frozen rounds its operands already: it is left, and its note says how.
    """

    name = "insert-fake-quantize"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node, form in products(gm):
            op, spec = weight_op(node), note_of(node).spec
            if op is None and spec is not None:
                self._round(gm, node, form, spec)
                result.changed += 1
            elif op is not None and target_name(op) == FAKE_QUANTIZE_WEIGHT and self.name not in note_of(op).made_by:
                amend_note(node, spec=_spec_of_module(node, op), reason=_OF_MODULE)
                result.declined.append(Declined(where(node), _OF_MODULE, node.name))
        return result

    def _round(self, gm: GraphModule, node: Node, form: Form, spec: LinearSpec) -> None:
        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            with gm.graph.inserting_before(node):
                return add_call(gm.graph, target, args, like=node, made_by=self.name, kwargs=kwargs)

        assert spec.weights is not None  # quantized activations come with quantized weights
        x = activation_of(node)
        if spec.activations is not None and x is not None:
            assert form.activation is not None
            node.update_arg(form.activation, call(FAKE_QUANTIZE, x, str(spec.activations)))
        node.update_arg(form.weight, _rounded_weight(call, weight_of(node), spec))


def _rounded_weight(call: Callable[..., Node], weight: Node, spec: LinearSpec) -> Node:
    """The rounded weight in the dtype of the given one: of the parameter itself, where capture spelled autocast out."""
    source = uncast(weight)
    algorithm = () if spec.algorithm == "auto" else (spec.algorithm,)
    rounded = call(torch.ops.fxquant.fake_quantize_weight.default, source, str(spec.weights), *algorithm)
    if source is weight:
        return rounded
    cast = call(weight.target, rounded, *weight.args[1:], **weight.kwargs)
    if not weight.users:
        weight.graph.erase_node(weight)
    return cast


def _spec_of_module(node: Node, op: Node) -> LinearSpec:
    x = activation_of(node)
    _, weights, *algorithm = map(str, op.args)
    return LinearSpec(TensorSpec.parse(weights), None if x is None else rounded_to(x), *algorithm)
