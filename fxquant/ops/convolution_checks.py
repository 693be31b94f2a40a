"""What a convolution's arguments must be, and the shape and memory format of its output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import ShapeMismatch
from fxquant.ops.checks import ACTIVATION_DTYPES, check_activation, check_devices, check_linear
from fxquant.ops.panels import check_coded

DYNAMIC = "fxquant.int8_conv_dynamic"
WEIGHT_ONLY = "fxquant.conv_weight_only"


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output: channels_last where x is, as aten.convolution has it on the CPU."""
    order = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}.get(x.dim())
    if order is None or x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for d in order:
        # A tensor that is both, such as one channel of one pixel, counts as contiguous.
        if x.shape[d] == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = x.stride(d) * x.shape[d]
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def empty_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The output of a convolution of x, not yet written."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def output_shape(
    op: str,
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """[B, O, *out]; works on symbolic sizes. Raises `ShapeMismatch`."""
    dims = len(kernel_size)
    if dims not in (1, 2, 3) or x.dim() != dims + 2 or not len(stride) == len(padding) == len(dilation) == dims:
        met = f"x of shape {list(x.shape)} with kernel {list(kernel_size)}, stride {list(stride)}"
        raise ShapeMismatch(op, met, "[B, I, *space] of one to three spatial dimensions, and as many of the others,")
    if min((*kernel_size, *stride, *dilation)) < 1 or min(padding) < 0:
        met = f"kernel {list(kernel_size)}, stride {list(stride)}, padding {list(padding)}, dilation {list(dilation)}"
        raise ShapeMismatch(op, met, "kernel, stride and dilation of at least 1, and padding of at least 0,")
    shape = [x.shape[0], out_channels]
    for axis in range(dims):
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        room = x.shape[axis + 2] + 2 * padding[axis] - reach
        if room < 0:
            met = f"an input of size {x.shape[axis + 2]} with padding {padding[axis]} in dimension {axis + 2}"
            raise ShapeMismatch(op, met, f"room for a kernel that reaches {reach}")
        shape.append(room // stride[axis] + 1)
    return shape


def check_int8(
    op: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The arguments of a convolution with int8 weights fit together. Returns the output's shape."""
    check_activation(op, x)
    out_channels = scale.shape[0] if scale.dim() else 1
    shape = output_shape(op, x, out_channels, kernel_size, stride, padding, dilation)
    in_features = x.shape[1] * math.prod(kernel_size)
    # The patches that the product multiplies: rows of that many features.
    check_linear(op, x.new_empty(0, in_features), packed, scale, bias, in_features)
    return shape


def check_weight_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    spec: str,
) -> None:
    """Weight and bias of conv_weight_only fit x."""
    check_activation(WEIGHT_ONLY, x)
    if x.dim() < 3:
        raise ShapeMismatch(WEIGHT_ONLY, f"x of shape {list(x.shape)}", "[B, I, *space]")
    check_devices(WEIGHT_ONLY, x=x, packed=packed, bias=bias)
    in_features = x.shape[1] * math.prod(kernel_size)
    check_coded(WEIGHT_ONLY, packed, scale, zero_point, tensor_scale, out_channels, in_features, spec)
    if bias is not None and (bias.dtype not in ACTIVATION_DTYPES or list(bias.shape) != [out_channels]):
        met = f"bias of shape {list(bias.shape)} and dtype {bias.dtype}"
        raise ShapeMismatch(WEIGHT_ONLY, met, f"a float bias of shape [{out_channels}]")
