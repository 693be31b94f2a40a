"""Which kernel runs a quantized site: an ordered tuple of rules, best first.

A rule says why it can't (`why_not`) or builds its node. What no rule takes runs as written: dequantize, then a
float product. That costs speed, never correctness.

Rules are written against a list of traps; none of them is ever emitted, and a test keeps it so:
oneDNN's qlinear with signed activations (a scalar reference on CPUs without AMX), torch's float32
``_weight_int8pack_mm`` and ``_weight_int4pack_mm_for_cpu`` (scalar references), and qlinear with run-time scale tensors
under max-autotune (it crashes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fxquant.graphs import add_call, value_of
from fxquant.lowering.site import QUANTIZE_DYNAMIC, QuantizedSite
from fxquant.numerics import MAX_IN_FEATURES
from fxquant.spec import TensorSpec
from fxquant.target import Target

INT8_PACK = torch.ops.fxquant.int8_pack.default
_MADE_BY = "lower"
_INT8_WEIGHT = TensorSpec.parse("int8/channel")
_INT8_TOKEN = TensorSpec.parse("int8/token")


@dataclass(frozen=True)
class Rule(ABC):
    """One way to run a site on a kernel."""

    kernel: ClassVar[str]

    @abstractmethod
    def why_not(self, site: QuantizedSite, target: Target) -> str:
        """Empty if the rule takes the site; else what was met and what the rule wants."""

    @abstractmethod
    def build(self, gm: GraphModule, site: QuantizedSite) -> Node:
        """The node that replaces the linear; inserted where the insertion point stands."""


class Int8Dynamic(Rule):
    """quantize per token → int8 product → scales, bias: one kernel, where no other product reads the same codes.

    before:  linear(dequantize(quantize_dynamic(x)), dequantize(@codes, @scale), b)
    after:   int8_linear_dynamic(x, int8_pack(@codes), @scale, b)
    """

    kernel = "int8_linear_dynamic"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if why := _no_int8_product(site, target) or _no_same_dtype(site):
            return why
        if site.x_quantize is not None and _readers(site.x_quantize) > 1:
            return "other products read the same codes of x"
        return ""

    def build(self, gm: GraphModule, site: QuantizedSite) -> Node:
        return _call(gm, site, torch.ops.fxquant.int8_linear_dynamic.default, site.x, _packed(gm, site), site.scale)


class Int8Shared(Rule):
    """The int8 product on codes that several products read, or in another dtype than x has (autocast).

    before:  linear(dequantize(xc, xs), dequantize(@codes, @scale), b)
    after:   int8_linear(xc, xs, int8_pack(@codes), @scale, b)
    """

    kernel = "int8_linear"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        return _no_int8_product(site, target)

    def build(self, gm: GraphModule, site: QuantizedSite) -> Node:
        assert site.x_quantize is not None
        if site.x_quantize.target is QUANTIZE_DYNAMIC:
            site.x_quantize.target = torch.ops.fxquant.int8_quantize_per_token.default
            site.x_quantize.args = site.x_quantize.args[:1]
        target = torch.ops.fxquant.int8_linear.default
        return _call(gm, site, target, site.x_codes, site.x_scale, _packed(gm, site), site.scale, tail=(site.dtype,))


class Int8WeightOnly(Rule):
    """The float product that widens int8 codes in registers.

    before:  linear(x, dequantize(@codes, @scale), b)
    after:   int8_linear_weight_only(x, int8_pack(@codes), @scale, b)
    """

    kernel = "int8_linear_weight_only"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        if site.spec.activations is not None:
            return f"x is quantized to {site.spec.activations}, the rule wants a float x"
        return _no_int8_weight(site, target) or _no_same_dtype(site)

    def build(self, gm: GraphModule, site: QuantizedSite) -> Node:
        return _call(gm, site, torch.ops.fxquant.int8_linear_weight_only.default, site.x, _packed(gm, site), site.scale)


RULES: tuple[Rule, ...] = (
    Int8Dynamic(),  # first: quantization inside the kernel saves a pass over x
    Int8Shared(),  # siblings that could not be joined: x is quantized once for all of them; autocast
    Int8WeightOnly(),
)


def _no_int8_weight(site: QuantizedSite, target: Target) -> str:
    if site.spec.weights != _INT8_WEIGHT:
        return f"the weight is {site.spec.weights}, the rule wants {_INT8_WEIGHT}"
    if site.device_type != "cpu":
        return f"the weight is on {site.device_type}, the kernel is for the CPU"
    if not target.has_int8_kernel:
        return "this machine has no compiled int8 kernel (see the warning about the compiler)"
    if site.in_features > MAX_IN_FEATURES:
        return f"in_features is {site.in_features}: above {MAX_IN_FEATURES} a column's sum of codes may overflow"
    return ""


def _no_same_dtype(site: QuantizedSite) -> str:
    x = value_of(site.x)
    return "" if x.dtype is site.dtype else f"x is {x.dtype}, the product {site.dtype}: the kernel gives what it takes"


def _no_int8_product(site: QuantizedSite, target: Target) -> str:
    if site.spec.activations != _INT8_TOKEN:
        return f"x is {site.spec.activations or 'float'}, the rule wants {_INT8_TOKEN}"
    return _no_int8_weight(site, target)


def _readers(quantize: Node) -> int:
    """How many products read the codes of a quantize node: through getitem, then dequantize or a kernel."""
    products = set()
    for part in quantize.users:
        for reader in part.users:
            is_kernel = reader.target is torch.ops.fxquant.int8_linear.default
            products |= {reader} if is_kernel else set(reader.users)
    return len(products)


def _packed(gm: GraphModule, site: QuantizedSite) -> Node:
    """The packed codes; a module that is called twice has one packed form, made before its first call."""
    made = next((user for user in site.codes.users if user.target is INT8_PACK), None)
    return made or add_call(gm.graph, INT8_PACK, (site.codes,), like=site.codes, made_by=_MADE_BY)


def _call(
    gm: GraphModule, site: QuantizedSite, target: Any, *operands: Node | None, tail: tuple[Any, ...] = ()
) -> Node:
    args = (*operands, site.bias, site.in_features, *tail)
    return add_call(gm.graph, target, args, like=site.linear, made_by=_MADE_BY)
