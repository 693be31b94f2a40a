"""Convolutions over packed weights: int8_conv_dynamic, conv_weight_only. One to three spatial dimensions, one group.

A weight [O, I, *kernel] is quantized and packed as [O, I * prod(kernel)]. The output is float32 rounded once to x's
dtype, in the memory format that aten.convolution gives: channels_last where x is. Gradients to x and bias are those of
the dequantized weight, straight through the rounding of x for the dynamic one; those to scales are refused, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import GradientsNeedTraining
from fxquant.numerics import int8_matmul, unpack_int8
from fxquant.ops.convolution_checks import (
    DYNAMIC,
    WEIGHT_ONLY,
    check_int8,
    check_weight_only,
    empty_like,
    output_shape,
)
from fxquant.ops.library import declare
from fxquant.ops.linear import dequantized
from fxquant.ops.quantize import quantize_dynamic


def int8_conv_dynamic(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    isa: int = 0,
) -> Tensor:
    """Convolution of x, quantized per sample here, with int8 weights: exact integer sums, then the scales.

    x [B, I, *space] float32, bfloat16 or float16; packed = int8_pack of codes [O, I * prod(kernel_size)]; scale float32
    [O, 1] or [O]; bias [O] or None. Returns [B, O, *out]: float(sum) * (x_scale * scale) + bias. `isa` picks a kernel's
    instruction set, for tests.
    """
    shape = check_int8(DYNAMIC, x, packed, scale, bias, kernel_size, stride, padding, dilation)
    codes, x_scale, _ = quantize_dynamic(x, "int8/sample")
    sums = product_of_codes(codes, packed, shape, kernel_size, stride, padding, dilation)
    y = sums.float() * (x_scale * scale.reshape(-1, *[1] * len(kernel_size)))
    return finish(x, y, bias)


def product_of_codes(
    codes: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of int8 codes [B, I, *space] with packed ones, exact: int64, in the shape of the output."""
    channels = codes.shape[1]
    weight = unpack_int8(packed, shape[1], channels * math.prod(kernel_size)).view(shape[1], channels, -1)
    total = torch.zeros(math.prod(shape) // max(shape[1], 1), shape[1], dtype=torch.int64, device=codes.device)
    for index, window in enumerate(_windows(codes, shape[2:], kernel_size, stride, padding, dilation)):
        total += int8_matmul(window.movedim(1, -1).reshape(-1, channels), weight[:, :, index])
    return total.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _int8_conv_dynamic_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    isa: int = 0,
) -> Tensor:
    return empty_like(x, check_int8(DYNAMIC, x, packed, scale, bias, kernel_size, stride, padding, dilation))


def conv_weight_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    spec: str,
    isa: int = 0,
) -> Tensor:
    """Convolution of float x with a weight of any format, float32 sums.

    x [B, I, *space] float32, bfloat16 or float16; packed, scale, zero_point, tensor_scale: a weight
    [out_channels, I * prod(kernel_size)] as linear_weight_only takes it. Returns [B, O, *out] in x's dtype.
    """
    check_weight_only(x, packed, scale, zero_point, tensor_scale, bias, out_channels, kernel_size, spec)
    output_shape(WEIGHT_ONLY, x, out_channels, kernel_size, stride, padding, dilation)
    in_features = x.shape[1] * math.prod(kernel_size)
    weight = _decoded(packed, scale, zero_point, tensor_scale, out_channels, in_features, spec)
    weight = weight.view(out_channels, x.shape[1], *kernel_size)
    return finish(x, _convolve(x.float(), weight, stride, padding, dilation), bias)


def _conv_weight_only_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    spec: str,
    isa: int = 0,
) -> Tensor:
    check_weight_only(x, packed, scale, zero_point, tensor_scale, bias, out_channels, kernel_size, spec)
    return empty_like(x, output_shape(WEIGHT_ONLY, x, out_channels, kernel_size, stride, padding, dilation))


def _windows(
    codes: Tensor,
    out: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """For each position of the kernel, last dimension fastest: what it sees, [B, I, *out]; code 0 outside of x."""
    sides = [p for pad in reversed(padding) for p in (pad, pad)]
    padded = torch.nn.functional.pad(codes, sides)
    found = []
    for at in torch.cartesian_prod(*(torch.arange(k) for k in kernel_size)).view(-1, len(kernel_size)).tolist():
        window = padded
        for axis, (offset, n) in enumerate(zip(at, out, strict=True)):
            first = offset * dilation[axis]
            window = window.narrow(axis + 2, first, (n - 1) * stride[axis] + 1)
            window = window[(slice(None),) * (axis + 2) + (slice(None, None, stride[axis]),)]
        found.append(window)
    return found


def _convolve(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    zeros = [0] * len(stride)
    # Autocast would round x and weight to bfloat16, and cuDNN sums to TF32.
    with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
        return torch.ops.aten.convolution.default(x, weight, None, stride, padding, dilation, False, zeros, 1)


def _decoded(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_channels: int,
    in_features: int,
    spec: str,
) -> Tensor:
    return torch.ops.fxquant.decode_weight.default(
        packed, scale, zero_point, tensor_scale, out_channels, in_features, spec, torch.float32
    )


def finish(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, O, *out] plus bias, rounded to x's dtype, in the memory format of a convolution of x."""
    if bias is not None:
        y = y + bias.float().view(-1, *[1] * (y.dim() - 2))
    made = empty_like(x, list(y.shape))
    return made.copy_(y)


def conv_gradients(
    ctx: Any, grad: Tensor, weight: Callable[[], Tensor], bias_position: int, count: int
) -> tuple[Tensor | None, ...]:
    """Gradients to the `count` arguments of a convolution: to x, the first, and to the bias at its position.

    ctx.geometry: x's shape, stride, padding, dilation; weight() float32 [O, I, *kernel].
    """
    grads: list[Tensor | None] = [None] * count
    x_shape, stride, padding, dilation = ctx.geometry
    zeros = [0] * len(stride)
    if ctx.needs_input_grad[0]:
        like = grad.new_empty(1, dtype=torch.float32).expand(x_shape)
        asked = [True, False, False]
        made, _, _ = torch.ops.aten.convolution_backward.default(
            grad.float(), like, weight(), None, stride, padding, dilation, False, zeros, 1, asked
        )
        grads[0] = made.to(ctx.dtype)
    if ctx.needs_input_grad[bias_position]:
        dims = [0, *range(2, grad.dim())]
        grads[bias_position] = grad.float().sum(dims).to(ctx.bias_dtype)
    return tuple(grads)


def _save_dynamic(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, bias, kernel_size, stride, padding, dilation, _ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.kernel_size, ctx.geometry = kernel_size, (x.shape, stride, padding, dilation)
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward_dynamic(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[2]:
        raise GradientsNeedTraining(f"{DYNAMIC}, weight scale")

    packed, scale = ctx.saved_tensors
    return conv_gradients(ctx, grad, lambda: int8_weight(ctx, packed, scale), 3, 9)


def int8_weight(ctx: Any, packed: Tensor, scale: Tensor) -> Tensor:
    """The weight float32 [O, I, *kernel] of an int8 convolution. ctx: geometry and kernel_size."""
    channels = ctx.geometry[0][1]
    return dequantized(packed, scale, channels * math.prod(ctx.kernel_size)).view(-1, channels, *ctx.kernel_size)


def _save_weight_only(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero_point, tensor_scale, bias, out_channels, kernel_size, *geometry, spec, _ = inputs
    ctx.save_for_backward(packed, scale, zero_point, tensor_scale)
    ctx.kernel_size, ctx.geometry, ctx.weight = kernel_size, (x.shape, *geometry), (out_channels, spec)
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward_weight_only(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[2:5]):
        raise GradientsNeedTraining(f"{WEIGHT_ONLY}, weight scale")

    def weight() -> Tensor:
        channels, (out_channels, spec) = ctx.geometry[0][1], ctx.weight
        in_features = channels * math.prod(ctx.kernel_size)
        packed, scale, zero_point, tensor_scale = ctx.saved_tensors
        decoded = _decoded(packed, scale, zero_point, tensor_scale, out_channels, in_features, spec)
        return decoded.view(-1, channels, *ctx.kernel_size)

    return conv_gradients(ctx, grad, weight, 5, 13)


declare(
    "int8_conv_dynamic(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int isa=0) -> Tensor",
    reference=int8_conv_dynamic,
    fake=_int8_conv_dynamic_fake,
    backward=_backward_dynamic,
    setup_context=_save_dynamic,
)
declare(
    "conv_weight_only(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, Tensor? bias, "
    "int out_channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, str spec, int isa=0) -> Tensor",
    reference=conv_weight_only,
    fake=_conv_weight_only_fake,
    backward=_backward_weight_only,
    setup_context=_save_weight_only,
)
