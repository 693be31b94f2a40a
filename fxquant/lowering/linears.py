"""Rules for linears: int8 by rows on kernels of its own, every other format on the kernels that decode tiles."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.graphs import VALUE_KEY, value_of
from fxquant.lowering.rule import (
    INT8_CHANNEL,
    INT8_PACK,
    Rule,
    add,
    float_activation,
    layout,
    no_kernel,
    no_panels,
    panels,
)
from fxquant.lowering.site import FAKE_QUANTIZE, QUANTIZE_DYNAMIC, QuantizedSite
from fxquant.ops.coded_linear import x_group_of
from fxquant.spec import TensorSpec
from fxquant.target import Target

_INT8_TOKEN = TensorSpec.parse("int8/token")
_FXQUANT = torch.ops.fxquant


class Int8Dynamic(Rule):
    """quantize per token → int8 product → scales, bias: one kernel, where no other product reads the same codes.

    before:  linear(dequantize(quantize_dynamic(x)), dequantize(@codes, @scale), b)
    after:   int8_linear_dynamic(x, int8_pack(@codes), @scale, b)
    """

    kind = "linear"
    kernel = "int8_linear_dynamic"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if why := _no_int8_product(site, target) or _no_same_dtype(site):
            return why
        if site.x_quantize is not None and _readers(site.x_quantize) > 1:
            return "other products read the same codes of x"
        return ""

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        return add(gm, site, _FXQUANT.int8_linear_dynamic.default, site.x, *_int8_operands(gm, site))


class Int8Shared(Rule):
    """The int8 product on codes that several products read, or in another dtype than x has (autocast).

    before:  linear(dequantize(xc, xs), dequantize(@codes, @scale), b)
    after:   int8_linear(xc, xs, int8_pack(@codes), @scale, b)
    """

    kind = "linear"
    kernel = "int8_linear"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if why := _no_int8_product(site, target):
            return why
        return "" if site.x_quantize is not None else "no codes of x are in the graph"

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        assert site.x_quantize is not None
        if site.x_quantize.target is QUANTIZE_DYNAMIC:
            site.x_quantize.target = _FXQUANT.int8_quantize_per_token.default
            site.x_quantize.args = site.x_quantize.args[:1]
            site.x_quantize.meta[VALUE_KEY] = value_of(site.x_quantize)[:2]  # it has no scale of the whole tensor
        codes, scale = site.x_operand.args[:2]
        return add(gm, site, _FXQUANT.int8_linear.default, codes, scale, *_int8_operands(gm, site), site.dtype)


class Int8WeightOnly(Rule):
    """The float product that widens int8 codes in registers.

    before:  linear(x, dequantize(@codes, @scale), b)
    after:   int8_linear_weight_only(x, int8_pack(@codes), @scale, b)
    """

    kind = "linear"
    kernel = "int8_linear_weight_only"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if site.spec.activations is not None:
            return f"x is quantized to {site.spec.activations}, the rule wants a float x"
        return _no_int8_weight(site, target) or _no_same_dtype(site)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        return add(gm, site, _FXQUANT.int8_linear_weight_only.default, site.x, *_int8_operands(gm, site))


class IntegerDynamic(Rule):
    """Integer weights of any width against x quantized per token or in groups: exact integer sums within each group.

    Those of stepped weights, where their steps are stored, are exact over whole rows, if x is quantized per token.

    before:  linear(dequantize(quantize_dynamic(x)), dequantize(@codes, @scale, @zero_point), b)
    after:   linear_dynamic(x, pack_panels(@codes), pack_granules(@scale), pack_granules(@zero_point), b)
             with x_group=32 where x is int8/group32
    """

    kind = "linear"
    kernel = "linear_dynamic"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if site.spec.activations is None:
            return f"x is float, the rule wants {_INT8_TOKEN}"
        if x_group_of(str(site.spec.activations)) is None:
            wants = f"{_INT8_TOKEN}, or groups of a multiple of 4 with float32 scales"
            return f"x is {site.spec.activations}, the rule wants {wants}"
        if why := no_kernel(site, target):
            return why
        weight = site.weight.spec
        if weight.format.kind != "int" or weight.scheme == "shift":
            return f"the weight is {weight}, the rule wants integers, symmetric or with an integer zero point"
        granularity = weight.granularity
        if granularity.kind == "block" or (granularity.kind == "group" and granularity.size % 4):
            return f"the weight is scaled per {granularity}, integer sums want whole rows or groups of a multiple of 4"
        return no_panels(site)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        *weight, _ = panels(gm, site)
        product = add(gm, site, _FXQUANT.linear_dynamic.default, site.x, *weight, *_tail(site))
        if group := x_group_of(str(site.spec.activations)):
            product.update_kwarg("x_group", group)
        return product


class WeightOnly(Rule):
    """The float product that decodes tiles of the weight; a quantized x is rounded to its format's values first.

    before:  linear(dequantize(quantize_dynamic(x)), dequantize(@codes, @scale), b)
    after:   linear_weight_only(fake_quantize(x), pack_panels(@codes), pack_granules(@scale), b)
    """

    kind = "linear"
    kernel = "linear_weight_only"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        return no_kernel(site, target) or no_panels(site)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        x, weight = float_activation(gm, site), panels(gm, site)
        return add(gm, site, _FXQUANT.linear_weight_only.default, x, *weight, *_tail(site))


def _tail(site: QuantizedSite) -> tuple[object, ...]:
    weight = site.weight
    return site.bias, weight.out_features, weight.in_features, str(weight.spec), site.dtype


def _int8_operands(gm: GraphModule, site: QuantizedSite) -> tuple[object, ...]:
    return layout(gm, site.weight.codes, INT8_PACK), site.weight.scale, site.bias, site.weight.in_features


def _no_int8_weight(site: QuantizedSite, target: Target) -> str:
    if site.weight.spec != INT8_CHANNEL:
        return f"the weight is {site.weight.spec}, the rule wants {INT8_CHANNEL}"
    return no_kernel(site, target)


def _no_same_dtype(site: QuantizedSite) -> str:
    x = value_of(site.x)
    return "" if x.dtype is site.dtype else f"x is {x.dtype}, the product {site.dtype}: the kernel gives what it takes"


def _no_int8_product(site: QuantizedSite, target: Target) -> str:
    if site.spec.activations != _INT8_TOKEN:
        return f"x is {site.spec.activations or 'float'}, the rule wants {_INT8_TOKEN}"
    if site.x_operand.target is FAKE_QUANTIZE and site.x_operand.args[1] != str(_INT8_TOKEN):
        return "x is rounded to another format"
    return _no_int8_weight(site, target)


def _readers(quantize: Node) -> int:
    """How many products read the codes of a quantize node: through getitem, then dequantize or a kernel."""
    products = set()
    for part in quantize.users:
        for reader in part.users:
            is_kernel = reader.target is _FXQUANT.int8_linear.default
            products |= {reader} if is_kernel else set(reader.users)
    return len(products)
