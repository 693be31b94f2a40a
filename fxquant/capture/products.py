"""Every product of an activation with a constant weight becomes a canonical one (see `fxquant.products`).

before:  addmm(@b, x, @w)     x @ @w     einsum("btd,dhk->bthk", x, @w)
after:   linear(x, t(@w), @b) linear(x, t(@w))  unflatten(linear(x, reshape(permute(@w))))

Convolutions and embeddings: see their own files. What is left gets its reason written on it, products of two
activations too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxquant.annotation import note_of
from fxquant.capture.convolutions import convolution
from fxquant.capture.editor import MADE_BY, Editor, bound_arguments, give_reason, is_transformed
from fxquant.capture.einsum import plan_einsum
from fxquant.capture.embeddings import embedding
from fxquant.graphs import constant_nodes, target_name, value_of
from fxquant.products import LINEAR, TWO_ACTIVATIONS
from fxquant.verify import PRODUCTS, multiplies_activations, multiplies_weight, opaque_word, product_word

_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEFT = "the weight stands left of the product: not quantized by this version"


def make_products_canonical(editor: Editor) -> None:
    """Rewrite what can be rewritten in place; write a reason on every other product with a weight."""
    anything, usable = constant_nodes(editor.gm), editor.constants()
    for node in list(editor.gm.graph.nodes):
        note = note_of(node)
        if multiplies_activations(node, anything) and not note.reason:
            give_reason(node, TWO_ACTIVATIONS)
            continue
        if not multiplies_weight(node, anything) or MADE_BY in note.made_by or note.reason:
            continue
        weight = _weightiest(node, anything)
        handler = _HANDLERS.get(product_word(node))
        if is_transformed(node):
            reason = "a product inside a function transform such as torch.vmap: left as it is"
        elif weight not in usable:
            reason = "the model writes to the weight while it runs"
        elif handler is not None:
            reason = handler(editor, node, usable)
        else:
            reason = PRODUCTS.get(product_word(node)) or f"{opaque_word(node)} cannot be looked into: left as it is"
        if reason:
            give_reason(node, reason, editor.model.site(node, weight))


def _weightiest(node: Node, constant: set[Node]) -> Node:
    """The constant operand with the most axes; of two, that of floats: indices of a table may be constant too."""
    tensors = (n for n in node.all_input_nodes if n in constant and _is_tensor(n))
    return max(tensors, key=lambda n: (value_of(n).dtype.is_floating_point, value_of(n).dim()))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value_of(value), torch.Tensor)


def _why_not_linear(x: Any, weight: Any, usable: set[Node]) -> str:
    """Why `x` and `weight` are not the operands of a linear, whichever way round the weight is stored."""
    if not (_is_tensor(x) and _is_tensor(weight)):
        return "an operand is no tensor"
    if weight not in usable:
        return _LEFT if x in usable else "the weight is computed from an activation"
    w, value = value_of(weight), value_of(x)
    if w.dim() != 2:
        return "a product with a vector" if w.dim() < 2 else PRODUCTS["bmm"]
    if w.dtype not in _FLOAT or value.dtype not in _FLOAT:
        return f"a product of {value.dtype} with {w.dtype}, not of floats"
    if w.layout is not torch.strided:
        return f"the weight's layout is {w.layout}"
    return "the activation has no dimensions" if value.dim() == 0 else ""


def _linear(editor: Editor, node: Node, usable: set[Node]) -> str:
    x, weight, bias = bound_arguments(node, "input", "weight", "bias")
    if why := _why_not_linear(x, weight, usable):
        return why
    if bias is None or _is_row(bias, weight, 0):
        if node.op == "call_function":  # the node itself stays: nothing about it changes but how it is called
            editor.turn_into(node, LINEAR, (x, weight) if bias is None else (x, weight, bias), weight)
            return ""
        editor.replace(node, editor.linear(node, x, weight, bias))
    else:
        editor.replace(node, editor.call(node, torch.ops.aten.add.Tensor, editor.linear(node, x, weight), bias))
    return ""


def _matmul(editor: Editor, node: Node, usable: set[Node]) -> str:
    x, weight = bound_arguments(node, "input|self|a", "mat2|other|b")
    if "out" in node.kwargs:
        return "a product with out="
    if why := _why_not_linear(x, weight, usable):
        return why
    editor.replace(node, editor.linear(node, x, transposed(editor, node, weight)))
    return ""


def _inner(editor: Editor, node: Node, usable: set[Node]) -> str:
    x, weight = bound_arguments(node, "input|self", "other")
    if "out" in node.kwargs:
        return "a product with out="
    if why := _why_not_linear(x, weight, usable):
        return why
    editor.replace(node, editor.linear(node, x, weight))
    return ""


def _addmm(editor: Editor, node: Node, usable: set[Node]) -> str:
    """beta * bias + alpha * (x @ w): the factors are applied to the bias and to the product, not to the weight."""
    bias, x, weight = bound_arguments(node, "input|self", "mat1", "mat2")
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if "out" in node.kwargs or len(node.args) > 3:
        return "a product with out=, or with factors in an old order"
    if not (isinstance(beta, (int, float)) and isinstance(alpha, (int, float))):
        return "beta or alpha is computed"
    if why := _why_not_linear(x, weight, usable):
        return why
    matrix = transposed(editor, node, weight)
    if beta == 1 and alpha == 1 and _is_row(bias, weight, 1):
        editor.replace(node, editor.linear(node, x, matrix, bias))
        return ""
    result = editor.linear(node, x, matrix)
    if alpha != 1:
        result = editor.call(node, torch.ops.aten.mul.Scalar, result, alpha)
    if beta != 0:  # with beta 0 the bias is not read at all: NaN in it must not come through
        result = editor.call(node, torch.ops.aten.add.Tensor, result, bias, alpha=beta)
    editor.replace(node, result)
    return ""


def _einsum(editor: Editor, node: Node, usable: set[Node]) -> str:
    """The activation's contracted indices go last, the weight becomes [N, K], the result gets the output's order."""
    equation, *operands = node.args
    if len(operands) and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(_is_tensor(n) for n in operands):
        return "an einsum of other than two operands"
    swapped = operands[0] in usable
    x, weight = operands[::-1] if swapped else operands
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if x in usable or weight not in usable:
        return "the weight is computed from an activation"
    if value_of(weight).dtype not in _FLOAT:
        return f"a product with {value_of(weight).dtype}, not with floats"
    plan = plan_einsum(equation, value_of(x).shape, value_of(weight).shape, swapped=swapped)
    if isinstance(plan, str):
        return plan
    aten = torch.ops.aten
    if plan.x_order != sorted(plan.x_order):
        x = editor.call(node, aten.permute.default, x, plan.x_order)
    if plan.contracted > 1:
        x = editor.call(node, aten.flatten.using_ints, x, -plan.contracted, -1)
    result = editor.linear(node, x, _einsum_weight(editor, node, weight, plan.weight_order, plan.matrix))
    if len(plan.made) != 1:
        result = editor.call(node, aten.unflatten.int, result, -1, plan.made)
    if plan.output_order != sorted(plan.output_order):
        result = editor.call(node, aten.permute.default, result, plan.output_order)
    editor.replace(node, result)
    return ""


def _einsum_weight(editor: Editor, like: Node, weight: Node, order: list[int], matrix: tuple[int, int]) -> Node:
    if order == [1, 0]:
        return transposed(editor, like, weight)
    if order != sorted(order):
        weight = editor.call(like, torch.ops.aten.permute.default, weight, order)
    if tuple(value_of(weight).shape) != matrix:
        weight = editor.call(like, torch.ops.aten.reshape.default, weight, list(matrix))
    return weight


def transposed(editor: Editor, like: Node, weight: Node) -> Node:
    """The transpose of a constant matrix; of `t(@w)` that is `@w` itself."""
    source = _source_of_transpose(weight)
    return source if source is not None else editor.call(like, torch.ops.aten.t.default, weight)


def _source_of_transpose(node: Node) -> Node | None:
    if node.op not in ("call_function", "call_method") or not node.args or not _is_tensor(node.args[0]):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    if value_of(source).dim() != 2 or node.kwargs:
        return None
    word, rest = target_name(node).removeprefix("aten."), node.args[1:]
    dims = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else list(rest)
    if word in ("t", "numpy_T", "mT", "adjoint") and not rest:
        return source
    if node.target is getattr and rest in (("T",), ("mT",)):
        return source
    if word in ("transpose", "swapaxes", "swapdims", "permute") and all(isinstance(d, int) for d in dims):
        order = [d % 2 for d in dims]  # pyright: ignore[reportOperatorIssue]
        return source if order == [1, 0] or (word != "permute" and order == [0, 1]) else None
    return None


def _is_row(bias: Any, weight: Node, axis: int) -> bool:
    """Whether the bias is one number for each output feature, which is what a linear's bias must be."""
    return _is_tensor(bias) and tuple(value_of(bias).shape) == (value_of(weight).shape[axis],)


_HANDLERS: dict[str, Callable[[Editor, Node, set[Node]], str]] = {
    "linear": _linear,
    "mm": _matmul,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "imatmul": _matmul,  # a tensor has no in-place matmul: `x @= w` makes a new one
    "inner": _inner,
    "addmm": _addmm,
    "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), convolution),
    "embedding": embedding,
}
