"""fuse-norms: a norm whose result is only quantized is computed where the codes are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult
from fxquant.graphs import add_call, is_written_between, source_line, target_name, value_of
from fxquant.ops.checks import ACTIVATION_DTYPES
from fxquant.passes.base import Pass
from fxquant.passes.sites import argument, torch_word
from fxquant.spec import TensorSpec
from fxquant.target import Problem

_OPS = torch.ops.fxquant
_QUANTIZE = _OPS.quantize_dynamic.default


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis, and the nodes that compute it, its result last."""

    kind: str
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Make the codes of a normalized activation in one pass over x.

    before:  n = rms_norm(x, [K], @w, eps)      xc, xs = quantize_dynamic(n, "int8/token")
    after:   xc, xs = norm_quantize(x, "rmsnorm", @w, None, eps, "int8/token")

    rms_norm, layer_norm, and an RMSNorm that is spelled out: w * (x * rsqrt(mean(x²) + eps)), in float32 or cast to it
    and back. Nothing but one quantize node may read the result. The kernel rounds the norm's result to x's dtype once;
    one that is spelled out in half precision rounded before it multiplied with w as well. Sums over K may be added in
    another order, so that a code may differ by one. `why_not` says which problems have a kernel.
    """

    why_not: Callable[[Problem], str]
    name = "fuse-norms"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node in gm.graph.find_nodes(op="call_function", target=_QUANTIZE):
            norm = norm_at(node.args[0])
            if norm is None:
                continue
            if why := why_not_into(norm, node) or _per_sample(node) or self.why_not(_problem(norm, str(node.args[1]))):
                place = source_line(norm.nodes[-1]) or norm.nodes[-1].name
                result.declined.append(Declined(place, f"{norm.kind}: {why}", norm.nodes[-1].name))
                continue
            self._fuse(gm, norm, node)
            result.changed += 1
        return result

    def _fuse(self, gm: GraphModule, norm: Norm, quantize: Node) -> None:
        args = (norm.x, norm.kind, norm.weight, norm.bias, norm.eps, quantize.args[1])
        with gm.graph.inserting_before(quantize):
            made = add_call(gm.graph, _OPS.norm_quantize.default, args, like=quantize, made_by=self.name)
        quantize.replace_all_uses_with(made)
        for node in (quantize, *reversed(norm.nodes)):
            gm.graph.erase_node(node)


def _problem(norm: Norm, spec: str) -> Problem:
    x = value_of(norm.x)
    return Problem("quantize", 0, 0, int(x.shape[-1]), "", spec, str(x.dtype).removeprefix("torch."), norm.kind)


def _per_sample(quantize: Node) -> str:
    is_sample = TensorSpec.parse(str(quantize.args[1])).granularity.kind == "sample"
    return "x is quantized per sample" if is_sample else ""


def why_not_into(norm: Norm, reader: Node) -> str:
    """Why a norm can't be computed where its result is read; empty if it can."""
    result = norm.nodes[-1]
    if others := [n for n in result.users if n is not reader]:
        return f"its result is read by {', '.join(dict.fromkeys(map(target_name, others)))} too"
    x, normed = value_of(norm.x), value_of(result)
    if x.dtype != normed.dtype:
        return f"it makes {normed.dtype} of {x.dtype}"
    if x.dtype not in ACTIVATION_DTYPES:
        return f"x is {x.dtype}"
    for t in (norm.weight, norm.bias):
        if t is not None and (list(value_of(t).shape) != [x.shape[-1]] or value_of(t).dtype not in ACTIVATION_DTYPES):
            return f"its weight or bias is {list(value_of(t).shape)} {value_of(t).dtype}"
    inside = set(norm.nodes)
    if any(not inside.issuperset(n.users) for n in norm.nodes[:-1]):
        return "what it computes on its way is read elsewhere"
    operands = [n for n in (norm.x, norm.weight, norm.bias) if n is not None]
    if any(is_written_between(n, norm.nodes[0], reader) for n in operands):
        return "the model writes to its input before the result is quantized"
    return ""


def norm_at(node: Any) -> Norm | None:
    """The norm over the last axis whose result that node is; None if it is none."""
    if not isinstance(node, Node):
        return None
    word = torch_word(node)
    if word in ("rms_norm", "layer_norm"):
        return _norm_op(node, word)
    return _spelled_out(node) if word == "mul" else None


def _norm_op(node: Node, word: str) -> Norm | None:
    x, shape = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    weight = argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if word == "layer_norm" else None
    place, default = (4, 1e-5) if word == "layer_norm" else (3, None)
    eps = argument(node, place, "eps", default)
    if not isinstance(x, Node) or not isinstance(shape, (tuple, list)) or len(shape) != 1:
        return None
    if eps is None:
        eps = torch.finfo(torch.float32).eps  # what torch takes for every dtype up to float32
    kind = "rmsnorm" if word == "rms_norm" else "layernorm"
    return Norm(kind, x, weight, bias, float(eps), (node,)) if isinstance(eps, (int, float)) else None


def _spelled_out(node: Node) -> Norm | None:
    """weight * cast(wide * rsqrt(mean(wide ** 2) + eps)), wide = cast(x)."""
    for weight, rest in _either_way(node):
        if not (_is_tensor(weight) and _is_tensor(rest)) or value_of(weight).dim() != 1:
            continue
        steps = [node]
        rest = _through_cast(rest, steps)
        if torch_word(rest) != "mul":
            continue
        for wide, root in _either_way(rest):
            found = _root_of_mean_square(wide, root)
            if found is None:
                continue
            eps, inner = found
            steps += [rest, *inner]
            x = _through_cast(wide, steps)
            return Norm("rmsnorm", x, weight, None, eps, tuple(sorted(steps)))
    return None


def _root_of_mean_square(wide: Any, root: Any) -> tuple[float, list[Node]] | None:
    """eps and the nodes, if root is rsqrt(mean(wide ** 2, -1, keepdim) + eps)."""
    if not (_is_tensor(wide) and _is_tensor(root)) or torch_word(root) != "rsqrt":
        return None
    total = argument(root, 0, "input")
    if not _is_tensor(total) or torch_word(total) != "add":
        return None
    for mean, eps in _either_way(total):
        if not isinstance(mean, Node) or torch_word(mean) != "mean" or not isinstance(eps, float):
            continue
        square, axis = argument(mean, 0, "input"), argument(mean, 1, "dim")
        if axis not in (-1, [-1], (-1,)) or argument(mean, 2, "keepdim") is not True or "dtype" in mean.kwargs:
            continue
        if isinstance(square, Node) and _is_square(square, wide):
            return eps, [root, total, mean, square]
    return None


def _is_square(node: Node, wide: Node) -> bool:
    match torch_word(node):
        case "pow":
            return node.args == (wide, 2)
        case "square":
            return node.args == (wide,)
        case "mul":
            return node.args == (wide, wide)
    return False


def _through_cast(node: Node, steps: list[Node]) -> Node:
    """The node behind a cast to another float dtype; the cast is noted as a step."""
    if torch_word(node) in ("to", "float", "_to_copy", "type_as") and node.args and _is_tensor(node.args[0]):
        is_dtype = all(isinstance(arg, (torch.dtype, Node)) for arg in node.args[1:])
        same = value_of(node).device == value_of(node.args[0]).device
        if is_dtype and same and not node.kwargs.keys() - {"dtype"}:
            steps.append(node)
            return node.args[0]
    return node


def _either_way(node: Node) -> tuple[tuple[Any, Any], ...]:
    if len(node.args) != 2 or node.kwargs:
        return ()
    one, other = node.args
    return (one, other), (other, one)


def _is_tensor(value: Any) -> TypeGuard[Node]:
    return isinstance(value, Node) and isinstance(value_of(value), torch.Tensor)
