"""The kernels of a frozen module, chosen by its specs as the compile door's lowering chooses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.nn.forms import Form, read

_FXQUANT = torch.ops.fxquant


def linear(module: Any, x: Tensor, bias: Tensor | None, activations: str) -> Tensor:
    """x [..., K] times the frozen weight of `module`, plus bias: y [..., N] in x's dtype."""
    held = module._holder()
    return linear_of(module, held.parts(), held._forms["weight"], x, bias, activations)


def linear_of(
    module: Any, parts: tuple[Tensor | None, ...], form: Form, x: Tensor, bias: Tensor | None, activations: str
) -> Tensor:
    """The same of a weight in its parts; `module` knows how x is rounded."""
    codes, scale, zero_point, tensor_scale = parts
    assert scale is not None
    if form.layout == "int8":
        if activations and not _rounds_inside(module, activations):
            x, activations = module.rounded(x, activations), ""
        if not activations:
            return _FXQUANT.int8_linear_weight_only(x, codes, scale, bias, form.columns)
        if module.input_scale is not None:
            return _FXQUANT.int8_linear_static(x, module.input_scale, codes, scale, bias, form.columns)
        return _FXQUANT.int8_linear_dynamic(x, codes, scale, bias, form.columns)
    scale, zero_point = read(scale, form), None if zero_point is None else read(zero_point, form)
    tail = (bias, form.rows, form.columns, form.spec, x.dtype)
    if activations == "int8/token" and module.input_scale is None and form.takes_integers:
        return _FXQUANT.linear_dynamic(x, codes, scale, zero_point, *tail)
    return _FXQUANT.linear_weight_only(module.rounded(x, activations), codes, scale, zero_point, tensor_scale, *tail)


def convolution(module: Any, x: Tensor, bias: Tensor | None, activations: str, geometry: tuple[Any, ...]) -> Tensor:
    """The convolution of x [B, I, *space] by the frozen weight of `module`; geometry: kernel size, stride, padding,
    dilation."""
    held = module._holder()
    form: Form = held._forms["weight"]
    codes, scale, zero_point, tensor_scale = held.parts()
    assert scale is not None
    if form.layout == "int8":
        if module.input_scale is not None:
            return _FXQUANT.int8_conv_static(x, module.input_scale, codes, scale, bias, *geometry)
        return _FXQUANT.int8_conv_dynamic(x, codes, scale, bias, *geometry)
    x = module.rounded(x, activations)
    scale, zero_point = read(scale, form), None if zero_point is None else read(zero_point, form)
    return _FXQUANT.conv_weight_only(x, codes, scale, zero_point, tensor_scale, bias, form.rows, *geometry, form.spec)


def _rounds_inside(module: Any, activations: str) -> bool:
    """Whether the int8 kernels of linears quantize x themselves: by token, or with a calibrated scale."""
    static = module.input_scale is not None and module._static_spec == "int8/tensor"
    return static or (module.input_scale is None and activations == "int8/token")
