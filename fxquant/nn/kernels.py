"""The kernels of a frozen module, chosen by its specs as the compile door's lowering chooses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.nn import devices
from fxquant.nn.forms import ON_DEVICES, Form, decoded, read
from fxquant.ops.coded_linear import x_group_of
from fxquant.spec import TensorSpec

_FXQUANT = torch.ops.fxquant
_PAIRED = 4  # bits of codes that kernels read two a byte


def linear(module: Any, x: Tensor, bias: Tensor | None, activations: str) -> Tensor:
    """x [..., K] times the frozen weight of `module`, plus bias: y [..., N] in x's dtype."""
    held = module._holder()
    settle(held)
    arguments = module, held.parts(), held._forms["weight"], x, bias, activations
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return linear_of(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # torch's autograd of an op like ours costs 5 us, without gradients too
        return linear_of(*arguments)


def settle(held: Any) -> None:
    """Codes that rested on a CPU in the layout of a GPU take that of the CPU before they are read there."""
    if not torch.compiler.is_compiling() and any(form.layout in ON_DEVICES for form in held._forms.values()):
        held.settle()


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
    if form.layout in ON_DEVICES:
        return _tiled(module, parts, form, x, bias, activations)
    scale, zero_point = read(scale, form), None if zero_point is None else read(zero_point, form)
    tail = (bias, form.rows, form.columns, form.spec, x.dtype)
    if activations and module.input_scale is None and form.takes_integers:
        group = x_group_of(activations)
        if group is not None:
            grouped = {"x_group": group} if group else {}
            return _FXQUANT.linear_dynamic(x, codes, scale, zero_point, *tail, **grouped)
    return _FXQUANT.linear_weight_only(module.rounded(x, activations), codes, scale, zero_point, tensor_scale, *tail)


def _tiled(
    module: Any, parts: tuple[Tensor | None, ...], form: Form, x: Tensor, bias: Tensor | None, activations: str
) -> Tensor:
    """The same by the Triton kernels: on codes of x where they multiply those, else on x rounded to its format.

    Codes have no gradient: an x that wants one is rounded.
    """
    codes, scale, zero_point, tensor_scale = parts
    assert scale is not None
    zero_point = None if zero_point is None else read(zero_point, form)
    weight = codes, read(scale, form), zero_point, tensor_scale
    tail = bias, None, "", form.columns, form.spec, x.dtype, ()
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if activations and not wants_gradient:
        static = module.input_scale is not None
        x_spec = f"{module._static_spec.partition('/')[0]}/token" if static else activations
        if devices.multiplies_codes(x.device, form.spec, x_spec, form.rows, form.columns):
            if static:
                x_codes, x_scale = _FXQUANT.quantize_static(x, module.input_scale, module._static_spec)
                whole = None
            else:
                x_codes, x_scale, whole = _FXQUANT.quantize_dynamic(x, activations)
                if TensorSpec.parse(activations).format.bits == _PAIRED:
                    x_codes = _FXQUANT.pack_rows(x_codes, activations)
            return _FXQUANT.tiled_linear_codes(x_codes, x_scale, whole, x_spec, *weight, *tail)
    x = module.rounded(x, activations)
    if form.layout == "blocks":
        return nn.functional.linear(x, decoded(parts, form, x.dtype), None if bias is None else bias.to(x.dtype))
    return _FXQUANT.tiled_linear(x, *weight, *tail)


def multiplies_rows(module: Any) -> bool:
    """Whether the kernels of int8 rows serve a linear: they have no x in groups."""
    return not x_group_of(module._activation_spec or "int8/token")


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
