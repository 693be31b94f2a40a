"""fuse-gates: the product of a linear's halves, one of them activated, is computed before its kernel rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult
from fxquant.graphs import VALUE_KEY, target_name, value_of
from fxquant.numerics import PANEL
from fxquant.passes.around import ACTIVATION_WORDS, activation_name, give_operand, operand_of, sizes_of, tell
from fxquant.passes.base import Pass
from fxquant.passes.sites import torch_word, where

_OPS = torch.ops.fxquant
_TAKE_GATES = {
    _OPS.int8_linear.default,
    _OPS.int8_linear_dynamic.default,
    _OPS.int8_linear_static.default,
    _OPS.int8_linear_weight_only.default,
    _OPS.linear_dynamic.default,
    _OPS.linear_weight_only.default,
}
# What takes a part of a tensor and nothing else; which part, its value says.
_PARTS = ("getitem", "split", "split_with_sizes", "chunk", "tensor_split", "slice", "narrow")


@dataclass(frozen=True)
class Gated:
    """act(one half of the linear's columns) * the other half, and the nodes that compute it, the result last."""

    linear: Node
    name: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class FuseGates(Pass):
    """Give a linear's kernel the gated product of its two halves, as of gate and up that were joined.

    before:  g, u = split(int8_linear_dynamic(x, …), [h, h], -1)          y = silu(g) * u
    after:   y = int8_linear_dynamic(x, …, activation="silu_first")

    Halves however the model takes them (chunk, split, a slice), either one activated by relu, gelu or silu; nothing
    else may read any of it. The kernel computes in float32 and rounds once, where each operation of the model rounded.
    """

    name = "fuse-gates"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node in list(gm.graph.nodes):
            found = _gated_at(node)
            if found is None:
                continue
            if why := _why_not(found):
                result.declined.append(Declined(where(found.linear), f"{found.name}: {why}", found.linear.name))
            else:
                _fuse(gm, found)
                result.changed += 1
        return result


def _gated_at(product: Node) -> Gated | None:
    if torch_word(product) not in ("mul", "imul", "mul_") or len(product.args) != 2 or product.kwargs:
        return None
    for gate, other in (product.args, reversed(product.args)):
        if not isinstance(gate, Node) or not isinstance(other, Node) or torch_word(gate) not in ACTIVATION_WORDS:
            continue
        gate_path, other_path = _path_to_linear(gate.args[0] if gate.args else None), _path_to_linear(other)
        if gate_path and other_path and gate_path[0] is other_path[0]:
            linear = gate_path[0]
            halves = _half_of(gate_path[-1], linear), _half_of(other_path[-1], linear)
            if None not in halves and halves[0] != halves[1]:
                nodes = tuple(dict.fromkeys((*gate_path[1:], *other_path[1:], gate, product)))
                return Gated(linear, f"{activation_name(gate)}_{halves[0]}", nodes)
    return None


def _path_to_linear(part: Any) -> list[Node]:
    """The linear of which a node takes a part, and the nodes from there on to it; empty if there is none."""
    path = [part]
    while isinstance(path[0], Node):
        if path[0].target in _TAKE_GATES:
            return path
        if torch_word(path[0]) not in _PARTS or not path[0].args:
            break
        path.insert(0, path[0].args[0])
    return []


def _half_of(part: Node, linear: Node) -> str | None:
    """Which half of the linear's columns a view of its result is."""
    value, whole = value_of(part), value_of(linear)
    if not isinstance(value, Tensor) or not isinstance(whole, Tensor):
        return None
    half = int(whole.shape[-1]) // 2
    if sizes_of(value) != [*sizes_of(whole)[:-1], str(half)] or int(whole.shape[-1]) % 2:
        return None
    if list(map(str, value.stride())) != list(map(str, whole.stride())):
        return None
    return {"0": "first", str(half): "second"}.get(str(value.storage_offset()))


def _why_not(found: Gated) -> str:
    for node in (found.linear, *found.nodes[:-1]):
        if others := list(_readers_beside(node, found)):
            return f"a part of it is read by {', '.join(dict.fromkeys(map(target_name, others)))} too"
    if any(torch_word(n).endswith("_") or torch_word(n) == "imul" or n.kwargs.get("inplace") for n in found.nodes):
        return "the model computes it in place"
    if operand_of(found.linear, "activation") or operand_of(found.linear, "residual") is not None:
        return "the linear's kernel does something else with its result already"
    whole, made = value_of(found.linear), value_of(found.nodes[-1])
    if made.dtype != whole.dtype:
        return f"it makes {made.dtype} of {whole.dtype}"
    if not made.is_contiguous():
        return f"its result has the strides {list(made.stride())}"
    if (half := int(whole.shape[-1]) // 2) % PANEL:
        return f"halves of {half} columns, the kernels want a multiple of {PANEL}"
    return ""


def _readers_beside(node: Node, found: Gated) -> Iterator[Node]:
    return (reader for reader in node.users if reader not in found.nodes)


def _fuse(gm: GraphModule, found: Gated) -> None:
    linear, product = found.linear, found.nodes[-1]
    give_operand(linear, "activation", found.name)
    product.replace_all_uses_with(linear)
    linear.meta[VALUE_KEY] = value_of(product)
    for node in sorted(found.nodes, reverse=True):
        gm.graph.erase_node(node)
    tell(linear, f"+{found.name}", FuseGates.name)
