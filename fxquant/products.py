"""The canonical products: the calls that quantization is about, and where their operands stand.

After capture every product of an activation with a weight is one of three calls:

    aten.linear(x, w[, b])
    aten.convolution(x, w, b | None, stride, padding, dilation, False, output_padding, groups)
    aten.embedding(w, indices, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from fxquant.graphs import ancestors, is_ours, target_name, value_of
from fxquant.spec import TensorSpec

LINEAR = torch.ops.aten.linear.default
CONVOLUTION = torch.ops.aten.convolution.default
EMBEDDING = torch.ops.aten.embedding.default

Kind = Literal["linear", "conv", "embedding"]
# Why a product without a weight stays as it is: what capture writes on it.
TWO_ACTIVATIONS = "a product of two activations: stays float"
# What a quantized module that is not frozen makes of its weight, and training of any: by name, since ops are below.
FAKE_QUANTIZE_WEIGHT = "fxquant.fake_quantize_weight"
# Where the ops that round an activation take its spec.
_ROUNDING = {"fxquant.fake_quantize": 1, "fxquant.fake_quantize_static": 2}
_VIEWS = ("view", "reshape")
# What reports say of a product that the model door has quantized and frozen.
FROZEN = "frozen by the model door"


@dataclass(frozen=True)
class Form:
    """One canonical call: its kind, its word in sentences, the places of its operands, how many axes its weight has.

    ``activation`` is None for an embedding, whose indices are none.
    """

    kind: Kind
    word: str
    weight: int
    activation: int | None
    bias: int | None
    ranks: tuple[int, ...]


_LINEAR = Form("linear", "a linear", weight=1, activation=0, bias=2, ranks=(2,))
_CONVOLUTION = Form("conv", "a convolution", weight=1, activation=0, bias=2, ranks=(3, 4, 5))
_EMBEDDING = Form("embedding", "an embedding", weight=0, activation=None, bias=None, ranks=(2,))
CANONICAL = ("aten.linear", "aten.convolution", "aten.embedding")


def form_of(node: Node) -> Form | None:
    """What kind of canonical product the call is; None if it is none."""
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target is LINEAR and len(node.args) in (2, 3):
        return _LINEAR
    if node.target is CONVOLUTION and _is_plain(node.args):
        return _CONVOLUTION
    return _EMBEDDING if node.target is EMBEDDING else None


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Not transposed, and the geometry is given for every axis, as numbers."""
    if len(args) != 9 or args[6] is not False:
        return False
    lists = (*args[3:6], args[7])
    numbers = all(isinstance(given, (list, tuple)) and all(isinstance(n, int) for n in given) for given in lists)
    return numbers and len({len(given) for given in lists}) == 1


def products(gm: GraphModule) -> Iterator[tuple[Node, Form]]:
    """Every canonical product of the graph with its form, in graph order. The graph may be edited meanwhile."""
    found = [(node, form) for node in gm.graph.nodes if (form := form_of(node)) is not None]
    return iter(found)


def activation_of(product: Node) -> Node | None:
    """The float operand; None for an embedding."""
    form = form_of(product)
    return None if form is None or form.activation is None else _operand(product, form.activation)


def weight_of(product: Node) -> Node:
    form = form_of(product)
    assert form is not None
    weight = _operand(product, form.weight)
    assert weight is not None
    return weight


def bias_of(product: Node) -> Node | None:
    form = form_of(product)
    return None if form is None or form.bias is None else _operand(product, form.bias)


def _operand(product: Node, place: int) -> Node | None:
    operand = product.args[place] if place < len(product.args) else None
    assert operand is None or isinstance(operand, Node)
    return operand


def weight_op(product: Node) -> Node | None:
    """The last of fxquant's ops that the weight comes through: it rounds or decodes it; None for a plain weight.

    Of a table: or the op that rounds the rows which were looked up.
    """
    op = next((n for n in reversed(ancestors([weight_of(product)])) if is_ours(n)), None)
    if op is not None or product.target is not EMBEDDING:
        return op
    readers = _readers(product)
    while len(readers) == 1 and target_name(readers[0]).removeprefix("aten.") in _VIEWS:
        readers = _readers(readers[0])
    return next((n for n in readers if target_name(n) == FAKE_QUANTIZE_WEIGHT), None)


def _readers(rows: Node) -> list[Node]:
    """Who makes tensors of the rows; where shapes are dynamic, others ask for their size."""
    return [n for n in rows.users if isinstance(value_of(n), torch.Tensor)]


def rounded_to(x: Node) -> TensorSpec | None:
    """The spec that an activation was rounded to by fake quantization; None if it was not."""
    place = _ROUNDING.get(target_name(x)) if is_ours(x) else None
    return None if place is None else TensorSpec.parse(str(x.args[place]))
