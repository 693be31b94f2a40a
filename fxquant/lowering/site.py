"""A quantized site as lowering sees it: a linear whose operands stand behind dequantize nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import note_of
from fxquant.graphs import value_of
from fxquant.spec import LinearSpec

LINEAR = torch.ops.aten.linear.default
DEQUANTIZE = torch.ops.fxquant.dequantize.default
QUANTIZE_DYNAMIC = torch.ops.fxquant.quantize_dynamic.default
QUANTIZE_WEIGHT = torch.ops.fxquant.quantize_weight.default


@dataclass(frozen=True)
class QuantizedSite:
    """One product with its parts.

    ``x`` is the float activation; ``x_codes`` and ``x_scale`` are set if it is quantized in the graph (by the node
    ``x_quantize``). ``codes`` and ``scale`` are the folded weight.
    """

    linear: Node
    spec: LinearSpec
    x: Node
    codes: Node
    scale: Node
    bias: Node | None
    x_quantize: Node | None = None
    x_codes: Node | None = None
    x_scale: Node | None = None

    @property
    def in_features(self) -> int:
        return int(value_of(self.codes).shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return value_of(self.linear).dtype

    @property
    def device_type(self) -> str:
        return value_of(self.codes).device.type


def quantized_sites(gm: GraphModule) -> Iterator[QuantizedSite]:
    """Every annotated linear whose weight is folded, in graph order; one by one, since a site may be the next's x."""
    for node in gm.graph.find_nodes(op="call_function", target=LINEAR):
        if site := _site_of(node):
            yield site


def _site_of(node: Node) -> QuantizedSite | None:
    spec = note_of(node).spec
    weight = node.args[1]
    if spec is None or not isinstance(weight, Node) or weight.target is not DEQUANTIZE:
        return None
    codes, scale = weight.args[0], weight.args[1]
    x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
    assert isinstance(codes, Node)
    assert isinstance(scale, Node)
    assert isinstance(x, Node)
    assert bias is None or isinstance(bias, Node)
    if x.target is not DEQUANTIZE:
        return QuantizedSite(node, spec, x, codes, scale, bias)
    x_codes, x_scale = x.args[0], x.args[1]
    assert isinstance(x_codes, Node)
    assert isinstance(x_scale, Node)
    quantize = x_codes.args[0]
    assert isinstance(quantize, Node)
    source = quantize.args[0]
    assert isinstance(source, Node)
    return QuantizedSite(node, spec, source, codes, scale, bias, quantize, x_codes, x_scale)
