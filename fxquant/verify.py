"""The spec of each stage of a graph, as checks that can be run; and the canonical form, said once.

Ops are compared by name, so that a graph can be checked without loading the ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.annotation import note_of
from fxquant.errors import UnloweredSite, VerificationFailed
from fxquant.graphs import VALUE_KEY, constant_inputs, constant_nodes, target_name, value_of
from fxquant.numerics.held import held_dtype
from fxquant.products import (
    CANONICAL,
    FAKE_QUANTIZE_WEIGHT,
    TWO_ACTIVATIONS,
    activation_of,
    form_of,
    products,
    rounded_to,
    weight_of,
    weight_op,
)
from fxquant.spec import TensorSpec

QUANTIZE_WEIGHT = "fxquant.quantize_weight"
DEQUANTIZE = "fxquant.dequantize"

_CONVOLUTION = "this form of convolution is not quantized by this version"
_TRANSPOSED = "a transposed convolution: not quantized by this version"
_EMBEDDING = "this form of embedding is not quantized by this version"
_BAG = "an embedding bag adds up the rows that it looks up: not quantized by this version"
_RECURRENT = "a recurrent layer: not quantized by this version"
_BATCHED = "a batched product: not quantized by this version"
_ATTENTION = "an attention node that could not be taken apart"
_OF_ACTIVATIONS = ("scaled_dot_product_attention",)  # a constant among its operands is a mask, no weight
_OTHER = "this form of product is not quantized by this version"

# Every op that multiplies with a weight (or reads one), by its name without namespace: why it stays float if it
# could not be brought to the canonical form.
PRODUCTS: dict[str, str] = {
    **dict.fromkeys(("linear", "mm", "matmul", "__matmul__", "imatmul", "addmm", "inner", "einsum"), _OTHER),
    **dict.fromkeys(("__rmatmul__", "mv", "addmv", "tensordot", "multi_dot", "linalg_multi_dot"), _OTHER),
    **dict.fromkeys(("chain_matmul", "bilinear", "kron", "_int_mm", "_scaled_mm", "scaled_mm"), _OTHER),
    **dict.fromkeys(("addmm_", "addbmm_", "baddbmm_"), "an in-place product: not quantized by this version"),
    **dict.fromkeys(("bmm", "baddbmm", "addbmm", "_grouped_mm", "grouped_mm", "_scaled_grouped_mm"), _BATCHED),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_tbc"), _CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    "embedding": _EMBEDDING,
    **dict.fromkeys(("embedding_bag", "_embedding_bag"), _BAG),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell"), _RECURRENT),
    **dict.fromkeys(("multi_head_attention_forward", "_native_multi_head_attention"), _ATTENTION),
    "_transformer_encoder_layer_fwd": _ATTENTION,
    **dict.fromkeys(_OF_ACTIVATIONS, TWO_ACTIVATIONS),
}
_KNOWN_NAMESPACES = ("aten", "prims", "fxquant")
_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "alias")


def captured(gm: GraphModule) -> None:
    """Check what capture promises: named weights, a value on every node, the one form or a reason on every product."""
    _common(gm, "captured")
    constant = constant_nodes(gm)
    for node in gm.graph.nodes:
        if multiplies_weight(node, constant) and not is_canonical(node, constant) and not note_of(node).reason:
            claim = f"{target_name(node)} reads a weight, is none of {', '.join(CANONICAL)}, and has no reason"
            raise VerificationFailed("captured", node.name, claim)


def quantized(gm: GraphModule) -> None:
    """Check that each annotated product reads codes of the annotated spec, through `fxquant.dequantize`."""
    _common(gm, "quantized")
    for node in _sites(gm):
        spec, x = note_of(node).spec, activation_of(node)
        assert spec is not None
        sides = [("activation", x, spec.activations)] if x is not None else []
        for side, operand, wanted in (*sides, ("weight", weight_of(node), spec.weights)):
            if wanted is not None and (why := _why_not_behind_codes(operand, wanted)):
                raise VerificationFailed("quantized", node.name, f"its {side} should be {wanted}, but {why}")


def trainable(gm: GraphModule) -> None:
    """Check that each annotated product reads operands rounded to the annotated spec, and that nothing reads codes."""
    _common(gm, "trainable")
    for node in _sites(gm):
        spec, x, op = note_of(node).spec, activation_of(node), weight_op(node)
        assert spec is not None
        met = "" if op is None or target_name(op) != FAKE_QUANTIZE_WEIGHT else op.args[1]
        if met != str(spec.weights):
            claim = f"its weight should be rounded to {spec.weights}, but it is {met or 'not rounded'}"
            raise VerificationFailed("trainable", node.name, claim)
        if x is not None and rounded_to(x) != spec.activations:
            claim = f"its activation should be {spec.activations or 'float'}, but it is {rounded_to(x) or 'float'}"
            raise VerificationFailed("trainable", node.name, claim)


def lowered(gm: GraphModule, strict: bool) -> None:
    """Check that no weight is quantized at each call; with `strict`, that no annotated product kept its reference form.

    Raises:
        UnloweredSite: with `strict`, names the sites that no kernel took.
    """
    _common(gm, "lowered")
    for node in _calls(gm):
        if target_name(node) == QUANTIZE_WEIGHT:
            raise VerificationFailed("lowered", node.name, "it quantizes a weight at each call")
    if strict and (left := list(_sites(gm))):
        raise UnloweredSite([(_where(n), note_of(n).reason or "no kernel takes it") for n in left])


def product_word(node: Node) -> str:
    """The name in `PRODUCTS` of what the node calls; empty if it is no product."""
    if node.op not in ("call_function", "call_method"):
        return ""
    word = target_name(node).removeprefix("aten.")
    return word if word in PRODUCTS else ""


def opaque_word(node: Node) -> str:
    """What an op is called that nobody can look into: a custom op, or one with a graph of its own; else empty."""
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return target_name(node) if any(_is_subgraph(n) for n in node.all_input_nodes) else ""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return ""
    namespace, _, name = target._qualified_op_name.partition("::")
    return "" if namespace in _KNOWN_NAMESPACES else f"{namespace}.{name}"


def multiplies_weight(node: Node, constant: set[Node]) -> bool:
    """Whether the node brings an activation and a constant of two or more dimensions together in a product.

    What a custom op or a graph of its own (`torch.cond`) does with them is not known, and counts as a product. So does
    an embedding of constant indices: its table is what counts.
    """
    word = product_word(node)
    if word in _OF_ACTIVATIONS or (not word and not opaque_word(node)):
        return False
    weights = [n for n in node.all_input_nodes if n in constant]
    rank = max((v.dim() for n in weights if isinstance(v := value_of(n), torch.Tensor)), default=0)
    return rank >= 2 and (word == "embedding" or len(weights) < len(node.all_input_nodes))


def multiplies_activations(node: Node, constant: set[Node]) -> bool:
    """Whether the node is a product of two values that the call brings: attention's, say."""
    word = product_word(node)
    if not word or word.removeprefix("_").startswith("embedding") or multiplies_weight(node, constant):
        return False
    operands: list[Node] = []
    map_arg((node.args, node.kwargs), operands.append)  # one may be there twice
    return sum(isinstance(value_of(n), torch.Tensor) and n not in constant for n in operands) > 1


def is_canonical(node: Node, constant: set[Node]) -> bool:
    """Whether the node is one of the three products (see `fxquant.products`) with a constant weight of its rank."""
    form = form_of(node)
    if form is None:
        return False
    weight = weight_of(node)
    rank = value_of(weight).dim()
    if form.kind == "conv" and len(node.args[3]) != rank - 2:  # pyright: ignore[reportArgumentType]
        return False
    return weight in constant and activation_of(node) not in constant and rank in form.ranks


def _common(gm: GraphModule, stage: str) -> None:
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise VerificationFailed(stage, "graph", f"lint: {error}") from error
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            _attribute(gm, node, stage)
        if node.op != "output" and VALUE_KEY not in node.meta and not _is_subgraph(node):
            raise VerificationFailed(stage, node.name, f"it has no meta[{VALUE_KEY!r}]")


def _attribute(gm: GraphModule, node: Node, stage: str) -> None:
    found, value = attrgetter(str(node.target))(gm), value_of(node)  # lint has seen that it is there
    same = isinstance(found, torch.Tensor) and isinstance(value, torch.Tensor)
    if same and (found.shape != value.shape or found.dtype != value.dtype):
        met = f"{tuple(found.shape)} {found.dtype}"
        raise VerificationFailed(stage, node.name, f"it holds {met}, its value says {tuple(value.shape)} {value.dtype}")


def _why_not_behind_codes(operand: Any, wanted: TensorSpec) -> str:
    node = operand
    while isinstance(node, Node) and target_name(node).removeprefix("aten.") in _VIEWS and node.op != "get_attr":
        node = node.args[0]
    met = target_name(node) if isinstance(node, Node) else repr(node)
    if not isinstance(node, Node) or met != DEQUANTIZE:
        return f"it is {met}, not {DEQUANTIZE}"
    codes, text = node.args[0], node.args[3]
    if text != str(wanted):
        return f"it is dequantized as {text}"
    assert isinstance(codes, Node)
    dtype, device = value_of(codes).dtype, value_of(codes).device
    return "" if dtype == held_dtype(wanted.code_dtype, device) else f"its codes are {dtype}, not {wanted.code_dtype}"


def _sites(gm: GraphModule) -> Iterator[Node]:
    """Products in reference form that are annotated with a spec: no kernel runs them, or makes their weight."""
    for node, _ in products(gm):
        if note_of(node).spec is not None and not note_of(node).kernel:
            yield node


def _calls(gm: GraphModule) -> Iterator[Node]:
    return (n for n in gm.graph.nodes if n.op in ("call_function", "call_method"))


def _is_subgraph(node: Node) -> bool:
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None or "." in str(node.target):
        return False
    return isinstance(getattr(owner, str(node.target), None), torch.nn.Module)


def _where(node: Node) -> str:
    note = note_of(node)
    return note.path or note.source or ", ".join(str(n.target) for n in constant_inputs([node])) or node.name
