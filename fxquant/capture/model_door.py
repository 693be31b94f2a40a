"""What quantized modules call: their kernels are sites already, and are told apart from what this door quantizes.

before:  fxquant.int8_linear_dynamic(x, @fc_weight_codes, @fc_weight_scale, None, 64)      (the op's packet, as written)
after:   fxquant.int8_linear_dynamic.default(x, @fc_weight_codes, …)   {w=int8/channel x=int8/token}, of the module fc
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxquant.annotation import amend_note
from fxquant.capture.editor import Editor
from fxquant.graphs import ancestors, is_ours, target_name
from fxquant.products import FROZEN, rounded_to
from fxquant.spec import LinearSpec, TensorSpec

_CODES = ("packed", "rows", "tiles")  # what kernels call the codes that they read
# What a kernel does with x itself: a linear, and a convolution.
_INSIDE = {"dynamic": ("int8/token", "int8/sample"), "static": ("int8/tensor", "int8/tensor")}
_STATIC = "fxquant.quantize_static"
_QUANTIZING = ("fxquant.quantize_dynamic", _STATIC)


def spell_ops_out(editor: Editor) -> None:
    """Let every call of fxquant's ops name its overload: Dynamo shows the packet that modules call."""
    for node in editor.gm.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverloadPacket) and target._qualified_op_name.startswith("fxquant::"):
            node.target = target.default


def recognize_kernels(editor: Editor) -> None:
    """Write on each kernel of a frozen module the module's path, its spec, and who made it."""
    constant = editor.constants()
    for node in editor.gm.graph.nodes:
        arguments = _arguments(node) if is_ours(node) else {}
        codes = next((arguments[name] for name in _CODES if name in arguments), None)
        if codes in constant and node not in constant:
            path = editor.model.user(node, codes)
            amend_note(node, paths=(path,) if path else (), spec=_spec_of(node, arguments), reason=FROZEN)


def _arguments(node: Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _spec_of(node: Node, arguments: dict[str, Any]) -> LinearSpec:
    kernel, x = target_name(node).removeprefix("fxquant."), arguments.get("x")
    weights = TensorSpec.parse(arguments.get("spec", "int8/channel"))
    inside = _INSIDE.get(kernel.rpartition("_")[2])
    activations = TensorSpec.parse(inside["conv" in kernel]) if inside else None
    if group := arguments.get("x_group"):
        activations = TensorSpec.parse(f"int8/group{group}")
    if "x_spec" in arguments:
        activations = _spec_of_codes(arguments["codes"], arguments["x_spec"])
    elif activations is None and isinstance(x, Node):
        activations = rounded_to(x)
    return LinearSpec(weights, activations)


def _spec_of_codes(codes: Node, read_as: str) -> TensorSpec:
    """The spec of codes of an activation; those of a recorded scale are read as if each row had its own."""
    made = next((n for n in reversed(ancestors([codes])) if target_name(n) in _QUANTIZING), None)
    return TensorSpec.parse(str(made.args[2]) if made and target_name(made) == _STATIC else read_as)
