"""fold-weights: quantization of parameters moves from the call to the compile time."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.annotation import PassResult, note_of
from fxquant.folding import fold
from fxquant.graphs import constant_nodes, remove_dead
from fxquant.passes.base import Pass
from fxquant.passes.insert_qdq import QUANTIZE_WEIGHT
from fxquant.passes.sites import bias_of, linears

_OUTPUTS = ("codes", "scale", "zero_point")


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Replace quantize(constant) by its codes, and a bias that was put together from parameters by its value.

    before:  wc, ws, wz = quantize_weight(cat(@q, @k, @v))
             y          = linear(xd, dequantize(wc, ws, wz), cat(@qb, @kb, @vb))
    after:   y          = linear(xd, dequantize(@qkv_codes, @qkv_scale, @qkv_zero_point), @qkv_bias)

    The graph remembers how each folded tensor comes from the parameters, so that it can be folded again for another
    set of parameters. The output is bit-equal: folding moves work, it does not change it.
    """

    evaluate: bool = True
    name = "fold-weights"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        constant = constant_nodes(gm)
        for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE_WEIGHT):
            self._fold_codes(gm, node)
            result.changed += 1
        for node in linears(gm):
            bias = bias_of(node)
            if bias is not None and bias.op != "get_attr" and bias in constant and note_of(node).spec is not None:
                fold(gm, [bias], [f"{note_of(node).path}_bias"], evaluate=self.evaluate)
                result.changed += 1
        remove_dead(gm)
        return result

    def _fold_codes(self, gm: GraphModule, node: Node) -> None:
        parts: dict[Any, Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        indices = sorted(parts)
        names = [f"{note_of(node).path}_{_OUTPUTS[index]}" for index in indices]
        fold(gm, [parts[index] for index in indices], names, evaluate=self.evaluate)
