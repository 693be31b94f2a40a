"""fold-weights: quantization of parameters moves from the call to the compile time."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.annotation import PassResult, note_of
from fxquant.folding import fold
from fxquant.graphs import constant_nodes, remove_dead
from fxquant.passes.base import Pass
from fxquant.passes.insert_qdq import DEQUANTIZE
from fxquant.products import bias_of, products

# Where dequantize takes each tensor, and what its folded value is called.
_OPERANDS = {0: "codes", 1: "scale", 2: "zero_point", 5: "tensor_scale"}


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Replace quantize(constant) by its codes, and a bias that was put together from parameters by its value.

    before:  wc, ws, wz = quantize_weight(cat(@q, @k, @v))
             y          = linear(xd, dequantize(wc, ws, wz), cat(@qb, @kb, @vb))
    after:   y          = linear(xd, dequantize(@qkv_codes, @qkv_scale, @qkv_zero_point), @qkv_bias)

    Whatever stands between the parameters and dequantize goes: flattening, and the joining of parts that were quantized
    apart. The graph remembers how each folded tensor comes from the parameters, so that it can be folded again for
    another set of parameters. The output is bit-equal: folding moves work, it does not change it.
    """

    evaluate: bool = True
    name = "fold-weights"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        remove_dead(gm)  # a frozen module's weight that was only asked for its dtype is decoded in the graph
        constant = constant_nodes(gm)
        for node in gm.graph.find_nodes(op="call_function", target=DEQUANTIZE):
            codes = node.args[0]
            if codes in constant and isinstance(codes, Node) and codes.op != "get_attr":
                self._fold_codes(gm, node)
                result.changed += 1
        for node, _ in products(gm):
            bias = bias_of(node)
            if bias is not None and bias.op != "get_attr" and bias in constant and note_of(node).spec is not None:
                fold(gm, [bias], [f"{note_of(node).path}_bias"], evaluate=self.evaluate)
                result.changed += 1
        remove_dead(gm)
        return result

    def _fold_codes(self, gm: GraphModule, node: Node) -> None:
        operands = {name: node.args[place] for place, name in _OPERANDS.items() if place < len(node.args)}
        tensors = {name: operand for name, operand in operands.items() if isinstance(operand, Node)}
        names = [f"{note_of(node).path}_{name}" for name in tensors]
        fold(gm, list(tensors.values()), names, evaluate=self.evaluate)
