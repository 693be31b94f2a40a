"""What a lowering rule is, and the conditions and layouts that rules share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fxquant.graphs import add_call, value_of
from fxquant.lowering.site import FAKE_QUANTIZE, QuantizedSite
from fxquant.numerics import MAX_IN_FEATURES, fits_panels
from fxquant.products import Kind
from fxquant.spec import TensorSpec
from fxquant.target import Target

INT8_PACK = torch.ops.fxquant.int8_pack.default
PACK_PANELS = torch.ops.fxquant.pack_panels.default
PACK_GRANULES = torch.ops.fxquant.pack_granules.default
PACK_ROWS = torch.ops.fxquant.pack_rows.default
MADE_BY = "lower"
INT8_CHANNEL = TensorSpec.parse("int8/channel")


@dataclass(frozen=True)
class Rule(ABC):
    """One way to run a site on a kernel."""

    kind: ClassVar[Kind]
    kernel: ClassVar[str]

    @abstractmethod
    def why_not(self, site: QuantizedSite, target: Target) -> str:
        """Empty if the rule takes the site, one of its kind; else what was met and what the rule wants."""

    @abstractmethod
    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        """The node that replaces the product; inserted where the insertion point stands.

        A rule that has kernels to choose from writes its choice into the node's note.
        """


def no_kernel(site: QuantizedSite, target: Target) -> str:
    """There are no kernels where the weight is, or it is too wide for them."""
    if site.weight.device_type != "cpu":
        return f"the weight is on {site.weight.device_type}, the kernel is for the CPU"
    if target.device != "cpu":
        return f"the kernel is for the CPU, the graph for {target.device}"
    if not target.has_kernels:
        return "this machine has no compiled kernels (see the warning about the compiler)"
    if site.weight.in_features > MAX_IN_FEATURES:
        features = site.weight.in_features
        return f"in_features is {features}: above {MAX_IN_FEATURES} a column's sum of codes may overflow"
    return ""


def no_panels(site: QuantizedSite) -> str:
    """The weight's scales can't be laid out by rows and pieces of rows."""
    granularity = site.weight.spec.granularity
    wants = f"the weight is scaled per {granularity}, the kernel wants scales of rows or pieces of rows"
    return "" if fits_panels(site.weight.spec) else wants


def add(gm: GraphModule, site: QuantizedSite, target: Any, *args: Any) -> Node:
    """A call of `target` in the place of the site's product."""
    return add_call(gm.graph, target, args, like=site.product, made_by=MADE_BY)


def layout(gm: GraphModule, source: Node, target: Any, *args: Any) -> Node:
    """A kernel's layout of a folded tensor; made once, before its first use, also if several sites read it."""
    made = next((user for user in source.users if user.target is target and user.args[1:] == args), None)
    return made or add_call(gm.graph, target, (source, *args), like=source, made_by=MADE_BY)


def panels(gm: GraphModule, site: QuantizedSite) -> tuple[Node, Node, Node | None, Node | None]:
    """(packed, scale, zero_point, tensor_scale) of the site's weight as the generic kernels read them."""
    weight = site.weight
    shape = (str(weight.spec), weight.out_features, weight.in_features)
    zero_point = weight.zero_point
    return (
        layout(gm, weight.codes, PACK_PANELS, str(weight.spec)),
        layout(gm, weight.scale, PACK_GRANULES, *shape),
        None if zero_point is None else layout(gm, zero_point, PACK_GRANULES, *shape),
        weight.tensor_scale,
    )


def float_activation(gm: GraphModule, site: QuantizedSite) -> Node:
    """x as a float: rounded to the values of its format, in one kernel, if the site wants it quantized."""
    operand, quantize = site.x_operand, site.x_quantize
    if quantize is None:
        return operand
    with gm.graph.inserting_before(quantize):  # where x was read: later the model may have written to it
        spec = str(site.spec.activations)
        rounded = add_call(gm.graph, FAKE_QUANTIZE, (site.x, spec), like=operand, made_by=MADE_BY)
    dtype = value_of(operand).dtype
    assert value_of(rounded).dtype == dtype
    operand.replace_all_uses_with(rounded)  # for all products that share it
    return rounded


def cast_to(gm: GraphModule, site: QuantizedSite, x: Node) -> Node:
    """x in the dtype of the product, which differs under autocast."""
    if value_of(x).dtype is site.dtype:
        return x
    cast = torch.ops.aten._to_copy.default
    return add_call(gm.graph, cast, (x,), like=site.product, made_by=MADE_BY, kwargs={"dtype": site.dtype})
