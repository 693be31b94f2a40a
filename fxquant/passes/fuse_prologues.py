"""fuse-prologues: a norm, or the product with a gate, is computed where a linear of the CPU reads its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult
from fxquant.graphs import is_written_between, source_line, target_name, value_of
from fxquant.ops.checks import ACTIVATION_DTYPES
from fxquant.passes.around import ACTIVATION_WORDS, activation_name, give_operand, sizes_of, tell
from fxquant.passes.base import Pass
from fxquant.passes.fuse_norms import norm_at, why_not_into
from fxquant.passes.sites import torch_word

_OPS = torch.ops.fxquant
_TAKE_PROLOGUES = {
    _OPS.int8_linear_dynamic.default,
    _OPS.int8_linear_static.default,
    _OPS.int8_linear_weight_only.default,
    _OPS.linear_dynamic.default,
    _OPS.linear_weight_only.default,
}


@dataclass(frozen=True)
class Prologue:
    """What x goes through: its name, operands as the ops take them, and the nodes that compute it, the result last."""

    name: str
    x: Node
    by: Node | None
    shift: Node | None
    eps: float
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class FusePrologues(Pass):
    """Give a linear's kernel the norm or the gated product that x comes from.

    before:  n = rms_norm(x, [K], @w, eps)          y = int8_linear_dynamic(n, …)
    after:   y = int8_linear_dynamic(x, …, prologue="rmsnorm", by=@w, eps=eps)

    before:  h = silu(g) * u                        y = int8_linear_dynamic(h, …)
    after:   y = int8_linear_dynamic(g, …, prologue="silu_mul", by=u)

    Norms as in `fuse_norms`; gates of relu, gelu, silu. Nothing but the linear may read the result. The kernel rounds
    to x's dtype once, where each operation of the model rounded; sums of a norm may be added in another order, so that
    a code of what is quantized then may differ by one.
    """

    name = "fuse-prologues"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node in [n for n in gm.graph.nodes if n.target in _TAKE_PROLOGUES]:
            found, why = _found(node)
            if found is None:
                continue
            if why:
                last = found.nodes[-1]
                result.declined.append(Declined(source_line(last) or last.name, f"{found.name}: {why}", last.name))
                continue
            _fuse(gm, found, node)
            result.changed += 1
        return result


def _found(linear: Node) -> tuple[Prologue | None, str]:
    """What the linear's x comes from, and why that can't be done in its kernel; empty if it can."""
    x: Any = linear.args[0]
    if (norm := norm_at(x)) is not None:
        found = Prologue(norm.kind, norm.x, norm.weight, norm.bias, norm.eps, norm.nodes)
        return found, why_not_into(norm, linear)
    found = _gate_at(x)
    return (None, "") if found is None else (found, _why_no_gate(found, linear))


def _gate_at(node: Any) -> Prologue | None:
    if not isinstance(node, Node) or torch_word(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    for gate, by in (node.args, reversed(node.args)):
        if isinstance(gate, Node) and isinstance(by, Node) and torch_word(gate) in ACTIVATION_WORDS:
            x = gate.args[0] if gate.args else None
            if isinstance(x, Node) and all(isinstance(value_of(n), Tensor) for n in (x, by)):
                return Prologue(f"{activation_name(gate)}_mul", x, by, None, 0.0, (gate, node))
    return None


def _why_no_gate(found: Prologue, linear: Node) -> str:
    assert found.by is not None
    gate, result = found.nodes
    for node, reader in ((result, linear), (gate, result)):
        if others := [n for n in node.users if n is not reader]:
            return f"its result is read by {', '.join(dict.fromkeys(map(target_name, others)))} too"
    if torch_word(gate).endswith("_") or gate.kwargs.get("inplace"):
        return "the model computes it in place"
    x, by, made = value_of(found.x), value_of(found.by), value_of(result)
    if not (x.dtype == by.dtype == made.dtype) or x.dtype not in ACTIVATION_DTYPES:
        return f"it makes {made.dtype} of {x.dtype} and {by.dtype}"
    if not (sizes_of(x) == sizes_of(by) == sizes_of(made)):
        return f"it makes shape {list(made.shape)} of {list(x.shape)} and {list(by.shape)}"
    if any(is_written_between(n, gate, linear) for n in (found.x, found.by)):
        return "the model writes to its input before the linear reads it"
    return ""


def _fuse(gm: GraphModule, found: Prologue, linear: Node) -> None:
    linear.update_arg(0, found.x)
    operands = {"prologue": found.name, "by": found.by, "shift": found.shift, "eps": found.eps}
    for name, value in operands.items():
        if value is not None and (name != "eps" or value):
            give_operand(linear, name, value)
    for node in reversed(found.nodes):
        gm.graph.erase_node(node)
    tell(linear, f"+{found.name}", FusePrologues.name)
