"""fuse-epilogues: what follows a linear element by element is done before the kernel rounds its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult
from fxquant.graphs import VALUE_KEY, is_written_between, target_name, value_of, written_by
from fxquant.passes.around import ACTIVATION_WORDS, activation_name, give_operand, operand_of, sizes_of, tell
from fxquant.passes.base import Pass
from fxquant.passes.sites import argument, torch_word, where

_OPS = torch.ops.fxquant
_TAKE_BOTH = {
    _OPS.tiled_linear.default,
    _OPS.tiled_linear_codes.default,
    _OPS.int8_linear.default,
    _OPS.int8_linear_dynamic.default,
    _OPS.int8_linear_static.default,
    _OPS.int8_linear_weight_only.default,
    _OPS.linear_dynamic.default,
    _OPS.linear_weight_only.default,
}
_ADDITIONS = ("add", "iadd", "add_")


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Give a linear's kernel the activation function and the residual that follow it.

    before:  y = r + gelu(tiled_linear(x, …, b, None, ""))
    after:   y = tiled_linear(x, …, b, r, "gelu")

    Of lowered linears only, whose kernels all take it; one that nothing else reads. The kernel computes in float32 and
    rounds once, where each operation of the model rounded its own result: in float32 the numbers are the same, in half
    precision they have up to two roundings less. One linear of a sum of two takes the other as its residual.
    """

    name = "fuse-epilogues"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node in [n for n in gm.graph.nodes if n.target in _TAKE_BOTH]:
            for step in (_fuse_activation, _fuse_residual):
                _take(gm, node, step, result)
        return result


def _take(gm: GraphModule, node: Node, step: Any, result: PassResult) -> None:
    outcome = step(gm, node)
    if outcome is True:
        result.changed += 1
    elif outcome:
        result.declined.append(Declined(where(node), outcome, node.name))


def _fuse_activation(gm: GraphModule, node: Node) -> bool | str:
    """True if it was done; else why not, empty where there is nothing to do."""
    found = next(
        (user for user in node.users if torch_word(user) in ACTIVATION_WORDS and user.args[:1] == (node,)), None
    )
    if found is None or operand_of(node, "residual") is not None or operand_of(node, "activation"):
        return ""
    if why := _why_not(node, found):
        return f"{torch_word(found)}: {why}"
    name = activation_name(found)
    give_operand(node, "activation", name)
    _replace(gm, found, node, f"+{name}")
    return True


def _fuse_residual(gm: GraphModule, node: Node) -> bool | str:
    found = next((user for user in node.users if torch_word(user) in _ADDITIONS and node in user.args[:2]), None)
    if found is None or operand_of(node, "residual") is not None:
        return ""
    if why := _why_not(node, found) or _why_no_residual(node, found):
        return f"residual: {why}"
    (residual,) = (operand for operand in found.args[:2] if operand is not node)
    found.prepend(node)  # the residual may be computed after x is
    give_operand(node, "residual", residual)
    _replace(gm, found, node, "+residual")
    return True


def _why_not(node: Node, user: Node) -> str:
    """Why what a linear's result goes through can't be done in its kernel; empty if it can."""
    if len(node.users) > 1:
        others = ", ".join(target_name(n) for n in node.users if n is not user)
        return f"the linear's result is read by {others} too"
    before, after = value_of(node), value_of(user)
    if before.dtype != after.dtype:
        return f"it makes {after.dtype} of {before.dtype}"
    if _layout(before) != _layout(after):
        return f"it makes shape {list(after.shape)} of {list(before.shape)}, or other strides"
    return ""


def _why_no_residual(node: Node, add: Node) -> str:
    others = [operand for operand in add.args[:2] if operand is not node]
    if len(others) != 1 or not isinstance(others[0], Node):
        return "what is added is no other tensor"
    residual = others[0]
    value, product = value_of(residual), value_of(node)
    if not isinstance(value, torch.Tensor):
        return "what is added is no other tensor"
    if sizes_of(value) != sizes_of(product) or value.dtype != product.dtype:
        met = f"{list(value.shape)} {value.dtype}"
        return f"what is added is {met}, the linear's result {list(product.shape)} {product.dtype}"
    if argument(add, 2, "alpha", 1) != 1 or add.kwargs.keys() - {"alpha"}:
        return "what is added is scaled first"
    if residual in written_by(add):
        return "the model adds in place to what is read elsewhere"
    if any(is_written_between(x, node, add) for x in node.all_input_nodes if isinstance(value_of(x), torch.Tensor)):
        return "the model writes to an input of the linear before it adds"
    return ""


def _replace(gm: GraphModule, user: Node, node: Node, word: str) -> None:
    """The linear stands for what was done with its result."""
    value = value_of(user)
    user.replace_all_uses_with(node)
    gm.graph.erase_node(user)
    node.meta[VALUE_KEY] = value
    tell(node, word, FuseEpilogues.name)


def _layout(value: torch.Tensor) -> tuple[list[str], list[str]]:
    sizes = sizes_of(value)
    return sizes, [str(stride) for size, stride in zip(sizes, value.stride(), strict=True) if size != "1"]
