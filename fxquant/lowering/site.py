"""A quantized site as lowering sees it: a product whose operands stand behind dequantize nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import note_of
from fxquant.graphs import value_of
from fxquant.products import Form, Kind, activation_of, bias_of, products, weight_of
from fxquant.spec import LinearSpec, TensorSpec

DEQUANTIZE = torch.ops.fxquant.dequantize.default
QUANTIZE_DYNAMIC = torch.ops.fxquant.quantize_dynamic.default
QUANTIZE_WEIGHT = torch.ops.fxquant.quantize_weight.default
FAKE_QUANTIZE = torch.ops.fxquant.fake_quantize.default
_VIEW = torch.ops.aten.view.default


@dataclass(frozen=True)
class QuantizedWeight:
    """The folded weight of a site: the operands of its dequantize node. Codes are [N, K], a convolution's flattened."""

    spec: TensorSpec
    codes: Node
    scale: Node
    zero_point: Node | None
    tensor_scale: Node | None

    @property
    def out_features(self) -> int:
        return int(value_of(self.codes).shape[0])

    @property
    def in_features(self) -> int:
        return int(value_of(self.codes).shape[1])

    @property
    def device_type(self) -> str:
        return value_of(self.codes).device.type


@dataclass(frozen=True)
class QuantizedSite:
    """One product with its parts.

    ``x`` is the float activation, or an embedding's indices. ``x_operand`` is what the product reads: ``x`` itself, or
    its quantized form, then one of DEQUANTIZE (of the codes that ``x_quantize`` makes) and FAKE_QUANTIZE.
    """

    product: Node
    kind: Kind
    spec: LinearSpec
    x: Node
    x_operand: Node
    weight: QuantizedWeight
    bias: Node | None = None
    x_quantize: Node | None = None

    @property
    def dtype(self) -> torch.dtype:
        return value_of(self.product).dtype


def quantized_sites(gm: GraphModule) -> Iterator[QuantizedSite]:
    """Every annotated product whose weight is folded, in graph order; one by one, since a site may be the next's x."""
    for node, form in products(gm):
        if site := _site_of(node, form):
            yield site


def _site_of(node: Node, form: Form) -> QuantizedSite | None:
    spec = note_of(node).spec
    if spec is None or spec.weights is None:
        return None
    weight = _weight_of(weight_of(node), spec.weights)
    if weight is None:
        return None
    operand = activation_of(node) or node.args[1]  # an embedding's indices
    assert isinstance(operand, Node)
    source, quantize = _activation_of(operand)
    return QuantizedSite(node, form.kind, spec, source, operand, weight, bias_of(node), quantize)


def _weight_of(operand: object, spec: TensorSpec) -> QuantizedWeight | None:
    node = operand
    if isinstance(node, Node) and node.target is _VIEW:  # a convolution's weight is quantized flattened
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not DEQUANTIZE:
        return None
    codes, scale, zero_point = node.args[:3]
    tensor_scale = node.args[5] if len(node.args) > 5 else node.kwargs.get("tensor_scale")
    assert isinstance(codes, Node)
    assert isinstance(scale, Node)
    assert zero_point is None or isinstance(zero_point, Node)
    assert tensor_scale is None or isinstance(tensor_scale, Node)
    return QuantizedWeight(spec, codes, scale, zero_point, tensor_scale)


def _activation_of(x: Node) -> tuple[Node, Node | None]:
    """The float activation behind x, and the node that makes its codes."""
    if x.target is FAKE_QUANTIZE:
        source, quantize = x.args[0], None
    elif x.target is DEQUANTIZE:
        codes = x.args[0]
        assert isinstance(codes, Node)
        quantize = codes.args[0]
        assert isinstance(quantize, Node)
        source = quantize.args[0]
    else:
        source, quantize = x, None
    assert isinstance(source, Node)
    return source, quantize
