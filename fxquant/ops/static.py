"""fake_quantize_static, int8_linear_static, int8_conv_static: activations rounded by one scale that was recorded.

code = clamp(rint(x * factor), -127, 127), with ties to the even code; factor = 1 / x_scale and x * factor are rounded
once in float32. Values beyond the range saturate. A value that is not finite is NaN, with all that is computed from its
row (in a convolution: its sample). A scale below 2**-126 makes all codes 0; one that is negative or not finite, NaN.

The products are those of int8_linear and int8_conv_dynamic. Against float64: |error| <= 3u |x_scale * scale * sum|
+ u |y| (+ u_out |y|), u = 2**-24. Gradients are straight through the rounding, and 0 where x was cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import GradientsNeedTraining, InvalidSpec, ShapeMismatch
from fxquant.ops.around import AFTER, BEFORE, check_after, check_before, columns_of, plain_gradients, prepared
from fxquant.ops.checks import activation_spec, check_activation, check_devices, check_linear
from fxquant.ops.convolution import conv_gradients, finish, int8_weight, product_of_codes
from fxquant.ops.convolution_checks import check_int8, empty_like
from fxquant.ops.library import declare
from fxquant.ops.linear import bias_gradient, dequantized, int8_linear
from fxquant.spec import INT8, TENSOR, TensorSpec

_FAKE_QUANTIZE = "fxquant.fake_quantize_static"
_LINEAR = "fxquant.int8_linear_static"
_CONV = "fxquant.int8_conv_static"
_INT8 = TensorSpec(INT8, TENSOR)


def fake_quantize_static(x: Tensor, scale: Tensor, spec: str) -> Tensor:
    """x of any shape but [], float32, bfloat16 or float16, rounded to the grid of `spec` under `scale`; in x's dtype.

    scale float32 [] or [1]; spec int8/tensor or a float format per tensor. The result is contiguous. Of a value within
    the range, |error| <= step / 2 + 3u |x| (+ u_out |x|), where step is the distance to the next code, times scale.
    """
    return numerics.rounded_by(x, scale, _check_fake_quantize(x, scale, spec))


def _fake_quantize_static_fake(x: Tensor, scale: Tensor, spec: str) -> Tensor:
    _check_fake_quantize(x, scale, spec)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def int8_linear_static(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Linear of x, rounded to int8 by x_scale here, with packed int8 weights.

    x [..., K] float32, bfloat16 or float16; x_scale float32 [] or [1]; all else as in int8_linear_dynamic. Returns
    [..., N] in x's dtype: int8_linear of the codes, bit for bit.
    """
    _check_linear(x, x_scale, packed, scale, bias, in_features)
    check_before(_LINEAR, x, prologue, by, shift)
    x = prepared(x, prologue, by, shift, eps)
    scales = numerics.given_scales(x_scale.reshape(()))
    codes = numerics.encode(x, scales, _INT8).codes
    of_rows = torch.where(x.isfinite().all(-1, keepdim=True), scales.scale, math.nan)
    return int8_linear(codes, of_rows, packed, scale, bias, in_features, x.dtype, isa, residual, activation)


def _int8_linear_static_fake(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    out_features = _check_linear(x, x_scale, packed, scale, bias, in_features)
    check_before(_LINEAR, x, prologue, by, shift)
    check_after(_LINEAR, x, out_features, residual, activation, x.dtype)
    return x.new_empty([*x.shape[:-1], columns_of(out_features, activation)])


def int8_conv_static(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    isa: int = 0,
) -> Tensor:
    """Convolution of x, rounded to int8 by x_scale here, with int8 weights: exact integer sums, then the scales.

    x_scale float32 [] or [1]; all else as in int8_conv_dynamic.
    """
    shape = _check_conv(x, x_scale, packed, scale, bias, kernel_size, stride, padding, dilation)
    scales = numerics.given_scales(x_scale.reshape(()))
    codes = numerics.encode(x, scales, _INT8).codes
    dims = len(kernel_size)
    finite = x.isfinite().flatten(1).all(1).view(-1, *[1] * (dims + 1))
    sums = product_of_codes(codes, packed, shape, kernel_size, stride, padding, dilation)
    y = sums.float() * (torch.where(finite, scales.scale, math.nan) * scale.reshape(-1, *[1] * dims))
    return finish(x, y, bias)


def _int8_conv_static_fake(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    isa: int = 0,
) -> Tensor:
    return empty_like(x, _check_conv(x, x_scale, packed, scale, bias, kernel_size, stride, padding, dilation))


def _check_fake_quantize(x: Tensor, scale: Tensor, text: str) -> TensorSpec:
    check_activation(_FAKE_QUANTIZE, x)
    spec = activation_spec(_FAKE_QUANTIZE, x, text)
    if spec.granularity != TENSOR or spec.scale != "float32":
        wanted = f"{_FAKE_QUANTIZE} takes one float32 scale for the whole tensor, such as int8/tensor"
        raise InvalidSpec(text, wanted)
    _check_scale(_FAKE_QUANTIZE, "scale", x, scale)
    return spec


def _check_linear(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int
) -> int:
    check_activation(_LINEAR, x)
    _check_scale(_LINEAR, "x_scale", x, x_scale)
    return check_linear(_LINEAR, x, packed, scale, bias, in_features)


def _check_conv(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    shape = check_int8(_CONV, x, packed, scale, bias, kernel_size, stride, padding, dilation)
    _check_scale(_CONV, "x_scale", x, x_scale)
    return shape


def _check_scale(op: str, name: str, x: Tensor, scale: Tensor) -> None:
    check_devices(op, x=x, **{name: scale})
    if scale.dtype != torch.float32 or list(scale.shape) not in ([], [1]):
        met = f"{name} of shape {list(scale.shape)} and dtype {scale.dtype}"
        raise ShapeMismatch(op, met, "float32 of shape [] or [1], one scale for the whole activation,")


def _inside(grad: Tensor, x: Tensor, scale: Tensor, spec: TensorSpec) -> Tensor:
    """grad, where x was not cut off."""
    return torch.where(numerics.inside_of(x, scale.reshape(()), spec), grad, 0.0)


def _refuse_scales(ctx: Any, op: str, **positions: int) -> None:
    for name, position in positions.items():
        if ctx.needs_input_grad[position]:
            raise GradientsNeedTraining(f"{op}, {name}")


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.spec = inputs
    ctx.save_for_backward(x, scale)


def _backward_fake_quantize(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_scales(ctx, _FAKE_QUANTIZE, scale=1)
    x, scale = ctx.saved_tensors
    return _inside(grad, x, scale, TensorSpec.parse(ctx.spec)), None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, x_scale, packed, scale, bias, ctx.in_features, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[0] else None, x_scale, packed, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_scales(ctx, _LINEAR, **{"activation scale": 1, "weight scale": 3})
    x, x_scale, packed, scale = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 7
    if ctx.needs_input_grad[0]:
        made = (grad.float() @ dequantized(packed, scale, ctx.in_features)).to(x.dtype)
        grads[0] = _inside(made, x, x_scale, _INT8)
    if ctx.needs_input_grad[4]:
        grads[4] = bias_gradient(grad, ctx.bias_dtype)
    return tuple(grads)


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, x_scale, packed, scale, bias, kernel_size, stride, padding, dilation, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[0] else None, x_scale, packed, scale)
    ctx.kernel_size, ctx.geometry = kernel_size, (x.shape, stride, padding, dilation)
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward_conv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_scales(ctx, _CONV, **{"activation scale": 1, "weight scale": 3})
    x, x_scale, packed, scale = ctx.saved_tensors
    made, *rest = conv_gradients(ctx, grad, lambda: int8_weight(ctx, packed, scale), 4, 10)
    return None if made is None else _inside(made, x, x_scale, _INT8), *rest


_SAVE_LINEAR, _BACKWARD_LINEAR = plain_gradients("int8_linear_static", 7, 13, _save_linear, _backward_linear)

declare(
    "fake_quantize_static(Tensor x, Tensor scale, str spec) -> Tensor",
    reference=fake_quantize_static,
    fake=_fake_quantize_static_fake,
    backward=_backward_fake_quantize,
    setup_context=_save_fake_quantize,
)
declare(
    "int8_linear_static(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, int in_features, "
    f"int isa=0, {AFTER}, {BEFORE}) -> Tensor",
    reference=int8_linear_static,
    fake=_int8_linear_static_fake,
    backward=_BACKWARD_LINEAR,
    setup_context=_SAVE_LINEAR,
)
declare(
    "int8_conv_static(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int isa=0) -> Tensor",
    reference=int8_conv_static,
    fake=_int8_conv_static_fake,
    backward=_backward_conv,
    setup_context=_save_conv,
)
