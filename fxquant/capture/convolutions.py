"""Every convolution of an activation with a constant weight becomes `aten.convolution`, with its geometry spelled out.

before:  conv2d(x, @w, @b, stride=2, padding=1)     conv1d(x, @w, padding="same")  (a kernel of even width)
after:   convolution(x, @w, @b, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)
                                                    convolution(constant_pad_nd(x, [0, 1]), @w, None, [1], [0], …)

Source of method for "same": torch 2.13, `_convolution_same` in aten/native/Convolution.cpp: the odd zero stands behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxquant.capture.editor import Editor, bound_arguments
from fxquant.graphs import target_name, value_of
from fxquant.products import CONVOLUTION
from fxquant.verify import PRODUCTS

_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPERANDS = ("input", "weight", "bias", "stride", "padding", "dilation")
_DEFAULTS = (None, None, None, 1, 0, 1)
_LONG_FORMS = ("convolution", "_convolution")  # these take transposed and output_padding before groups


@dataclass(frozen=True)
class _Geometry:
    """The lists of `aten.convolution`, one number for each spatial axis; ``behind`` are zeros put behind x."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    behind: list[int]


def convolution(editor: Editor, node: Node, usable: set[Node]) -> str:
    """Rewrite one convolution; returns why it stays, or nothing."""
    x, weight, bias, *given = _arguments(node)
    if weight not in usable or not isinstance(x, Node) or x in usable:
        return "the weight is computed from an activation" if weight not in usable else PRODUCTS["conv2d"]
    w, value = value_of(weight), value_of(x)
    if w.dtype not in _FLOAT or value.dtype not in _FLOAT:
        return f"a convolution of {value.dtype} with {w.dtype}, not of floats"
    geometry = _geometry(list(w.shape[2:]), given)
    if isinstance(geometry, str):
        return geometry
    batched = value.dim() == w.dim()
    if not batched:
        x = editor.call(node, torch.ops.aten.unsqueeze.default, x, 0)
    if any(geometry.behind):
        pads = [n for behind in reversed(geometry.behind) for n in (0, behind)]  # constant_pad_nd takes the last first
        x = editor.call(node, torch.ops.aten.constant_pad_nd.default, x, pads, 0.0)
    g, operands = geometry, _cast(editor, node, x, weight, bias)
    args = (*operands, g.stride, g.padding, g.dilation, False, [0] * len(g.stride), g.groups)
    if batched and node.op == "call_function":  # the node itself stays: nothing changes but how it is called
        editor.turn_into(node, CONVOLUTION, args, weight)
        return ""
    result = editor.product(node, CONVOLUTION, args, weight)
    editor.replace(node, result if batched else editor.call(node, torch.ops.aten.squeeze.dim, result, 0))
    return ""


def _cast(editor: Editor, node: Node, *operands: Any) -> list[Any]:
    """The operands in the dtype of the result: autocast knows `conv2d`, but not everywhere `aten.convolution`."""
    dtype, cast = value_of(node).dtype, torch.ops.aten._to_copy.default
    return [
        editor.call(node, cast, n, dtype=dtype) if isinstance(n, Node) and value_of(n).dtype != dtype else n
        for n in operands
    ]


def _arguments(node: Node) -> list[Any]:
    """input, weight, bias, stride, padding, dilation, groups, transposed; with their defaults."""
    long = target_name(node).removeprefix("aten.") in _LONG_FORMS
    names = (*_OPERANDS, "transposed", "output_padding", "groups") if long else (*_OPERANDS, "groups")
    found = bound_arguments(node, *names)
    operands = [default if value is None else value for value, default in zip(found, _DEFAULTS, strict=False)]
    groups = found[-1]
    return [*operands, 1 if groups is None else groups, bool(found[6]) if long else False]


def _geometry(kernel: list[int], given: Sequence[Any]) -> _Geometry | str:
    """The geometry, or why there is none. `given`: stride, padding, dilation, groups, transposed."""
    stride, padding, dilation, groups, transposed = given
    if transposed:
        return PRODUCTS["conv_transpose2d"]
    axes = len(kernel)
    strides, dilations = _numbers(stride, axes), _numbers(dilation, axes)
    if strides is None or dilations is None or not isinstance(groups, int):
        return "the stride, dilation or groups of the convolution are computed"
    behind = [0] * axes
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        paddings: list[int] | None = [n // 2 for n in total]
        behind = [n % 2 for n in total]
    else:
        paddings = [0] * axes if padding == "valid" else _numbers(padding, axes)
    if paddings is None:
        return "the padding of the convolution is computed"
    return _Geometry(strides, paddings, dilations, groups, behind)


def _numbers(given: Any, axes: int) -> list[int] | None:
    """One number for each axis, from a number or a sequence; None if one of them is computed in the graph."""
    values = [given] if isinstance(given, int) else list(given) if isinstance(given, (list, tuple)) else []
    values = values * axes if len(values) == 1 else values
    return values if len(values) == axes and all(isinstance(v, int) for v in values) else None
