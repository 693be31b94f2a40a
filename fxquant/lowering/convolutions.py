"""Rules for convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.graphs import add_call, value_of
from fxquant.lowering.rule import (
    INT8_CHANNEL,
    INT8_PACK,
    MADE_BY,
    PACK_ROWS,
    Rule,
    add,
    cast_to,
    float_activation,
    layout,
    no_kernel,
    no_panels,
    panels,
)
from fxquant.lowering.site import QuantizedSite
from fxquant.products import CONVOLUTION, weight_of
from fxquant.spec import TensorSpec
from fxquant.target import Target

_INT8_SAMPLE = TensorSpec.parse("int8/sample")
_FXQUANT = torch.ops.fxquant


class Int8Convolution(Rule):
    """The int8 product over patches of x, which is quantized per sample.

    before:  convolution(dequantize(quantize_dynamic(x)), view(dequantize(@codes, @scale)), b, stride, ...)
    after:   int8_conv_dynamic(x, int8_pack(@codes), @scale, b, kernel_size, stride, padding, dilation)
    """

    kind = "conv"
    kernel = "int8_conv_dynamic"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if site.spec.activations != _INT8_SAMPLE:
            return f"x is {site.spec.activations or 'float'}, the rule wants {_INT8_SAMPLE}"
        if site.weight.spec != INT8_CHANNEL:
            return f"the weight is {site.weight.spec}, the rule wants {INT8_CHANNEL}"
        return no_kernel(site, target) or _no_patches(site)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        x, weight = cast_to(gm, site, site.x), layout(gm, site.weight.codes, INT8_PACK)
        return add(
            gm, site, _FXQUANT.int8_conv_dynamic.default, x, weight, site.weight.scale, site.bias, *_geometry(site)
        )


class WeightOnlyConvolution(Rule):
    """The float product over patches of x that decodes tiles of the weight.

    before:  convolution(x, view(dequantize(@codes, @scale)), b, stride, ...)
    after:   conv_weight_only(x, pack_panels(@codes), pack_granules(@scale), b, kernel_size, stride, padding, dilation)
    """

    kind = "conv"
    kernel = "conv_weight_only"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        return no_kernel(site, target) or no_panels(site) or _no_patches(site)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        x, weight = cast_to(gm, site, float_activation(gm, site)), panels(gm, site)
        geometry = (site.weight.out_features, *_geometry(site), str(site.weight.spec))
        return add(gm, site, _FXQUANT.conv_weight_only.default, x, *weight, site.bias, *geometry)


class GroupedConvolution(Rule):
    """A convolution in groups: its weight, which is small, is decoded at each call, and the float kernel does the rest.

    before:  convolution(x, view(dequantize(@codes, @scale)), b, stride, ..., groups)
    after:   convolution(x, view(decode_rows(pack_rows(@codes), @scale)), b, stride, ..., groups)

    A depthwise kernel has few weights in each row: packed as rows they take the bytes of their format.
    """

    kind = "conv"
    kernel = "decode_rows"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        return no_kernel(site, target)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        x, weight, view = float_activation(gm, site), site.weight, value_of(weight_of(site.product))
        spec = str(weight.spec)
        rows = layout(gm, weight.codes, PACK_ROWS, spec)
        tail = (weight.scale, weight.zero_point, weight.tensor_scale, weight.in_features, spec, view.dtype)
        decoded = add(gm, site, _FXQUANT.decode_rows.default, rows, *tail)
        shaped = (decoded, list(view.shape))
        matrix = add_call(gm.graph, torch.ops.aten.view.default, shaped, like=site.product, made_by=MADE_BY)
        return add(gm, site, CONVOLUTION, x, matrix, *site.product.args[2:])


def _no_patches(site: QuantizedSite) -> str:
    transposed, groups = site.product.args[6], site.product.args[8]
    if transposed:
        return "the convolution is transposed"
    return f"the convolution has {groups} groups, the kernel wants one" if groups != 1 else ""


def _geometry(site: QuantizedSite) -> tuple[Any, ...]:
    """kernel_size, stride, padding, dilation."""
    weight = site.product.args[1]
    assert isinstance(weight, Node)
    kernel = [int(size) for size in value_of(weight).shape[2:]]
    assert math.prod(kernel) * int(value_of(weight).shape[1]) == site.weight.in_features
    return (kernel, *(list(given) for given in site.product.args[3:6]))  # pyright: ignore[reportArgumentType]
