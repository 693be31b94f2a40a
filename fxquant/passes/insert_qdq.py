"""insert-qdq: from here on the graph computes the quantized model, in reference arithmetic."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import PassResult, note_of
from fxquant.graphs import add_call, value_of
from fxquant.passes.base import Pass
from fxquant.passes.sites import activation_of, linears, weight_of
from fxquant.spec import TensorSpec

QUANTIZE_DYNAMIC = torch.ops.fxquant.quantize_dynamic.default
QUANTIZE_WEIGHT = torch.ops.fxquant.quantize_weight.default
DEQUANTIZE = torch.ops.fxquant.dequantize.default


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Put quantize → dequantize around the operands of every annotated product.

    before:  y = linear(x, @w, b)
    after:   xc, xs     = quantize_dynamic(x, "int8/token")
             wc, ws, wz = quantize_weight(@w, "int8/channel")
             y          = linear(dequantize(xc, xs), dequantize(wc, ws, wz), b)
    """

    name = "insert-qdq"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node in list(linears(gm)):
            spec = note_of(node).spec
            if spec is None or weight_of(node).target is DEQUANTIZE:
                continue
            if spec.activations is not None:
                x = activation_of(node)
                node.update_arg(0, self._around(gm, node, x, QUANTIZE_DYNAMIC, spec.activations))
            if spec.weights is not None:
                w = weight_of(node)
                node.update_arg(1, self._around(gm, node, w, QUANTIZE_WEIGHT, spec.weights))
            result.changed += 1
        return result

    def _around(self, gm: GraphModule, site: Node, value: Node, quantize: Any, spec: TensorSpec) -> Node:
        graph, text = gm.graph, str(spec)
        with graph.inserting_before(site):
            made = add_call(graph, quantize, (value, text), like=site, made_by=self.name)
            parts = [
                add_call(graph, operator.getitem, (made, i), like=site, made_by=self.name)
                for i in range(len(value_of(made)))
            ]
            codes, scale, zero_point = (*parts, None)[:3]
            args = (codes, scale, zero_point, text, value_of(value).dtype)
            return add_call(graph, DEQUANTIZE, args, like=site, made_by=self.name)
