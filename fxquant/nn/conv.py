"""Quantized convolutions.

Those without groups run on kernels that read codes. A convolution in groups has few weights, and a transposed one sums
in another order: their weights are decoded at each call, and torch's own kernel does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.nn import kernels, recording
from fxquant.nn.base import QModule
from fxquant.nn.linear import bias_like
from fxquant.nn.registry import register_module

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _Convolution(QModule):
    """What the three have in common: a weight [O, I / groups, *kernel], quantized as [O, I / groups * prod(kernel)];
    x [B, I, *space], or [I, *space], and quantized per sample."""

    kind = "conv"
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any  # a tuple, "same" or "valid"
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    bias: Tensor | None
    # As F.pad takes it: (before, after) of each dimension, the last one first.
    _reversed_padding_repeated_twice: Any
    if TYPE_CHECKING:  # torch's classes have these

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

        def _output_padding(self, input: Tensor, output_size: Any, *geometry: Any) -> Any: ...

    def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
        return matrix.reshape(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def has_kernels(self, name: str = "weight") -> bool:
        return self.groups == 1

    def has_int8_kernels(self, name: str = "weight") -> bool:
        """The kernels of int8 rows quantize x themselves: by sample, or with a calibrated scale."""
        static = self._activation_spec == "int8/tensor" and self.calibratable
        return static or self._activation_spec == "int8/sample"

    def float_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, bias_like(self.bias, weight))

    def kernel_product(self, x: Tensor, activations: str) -> Tensor:
        if self._holder()._forms["weight"].layout == "int8" and not self._rounds_inside(activations):
            # What a calibration sees, or a range that is not known yet.
            return self.float_product(self.rounded(x, activations), self.float_weight(x.dtype))
        x, padding = self._padded(x)
        geometry = (self.kernel_size, self.stride, padding, self.dilation)
        return kernels.convolution(self, x, self.bias, activations, geometry)

    def rounded(self, x: Tensor, activations: str) -> Tensor:
        y, last = super().rounded(x, activations), _CHANNELS_LAST.get(x.dim())
        if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
            return y
        return y.contiguous(memory_format=last)  # so that the product stays in it

    def _rounds_inside(self, activations: str) -> bool:
        if self.input_scale is not None:
            return bool(activations) and self._static_spec == "int8/tensor"
        return activations == "int8/sample"

    def _padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """x and the zeros that go around it on either side; what zeros can't say, or not on both, is put into x.

        That changes no scale: the values are x's own, or 0.
        """
        nothing, sides = [0] * len(self.kernel_size), self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return F.pad(x, tuple(sides), mode=self.padding_mode), nothing
        if not isinstance(self.padding, str):
            return x, list(self.padding)
        if self.padding == "valid":
            return x, nothing
        before, after = list(sides[0::2]), list(sides[1::2])
        return (x, before[::-1]) if before == after else (F.pad(x, tuple(sides)), nothing)

    def _computed(self, x: Tensor, activations: str) -> Tensor:
        if x.dim() == len(self.kernel_size) + 1:  # else its channels would be taken for samples
            return super()._computed(x.unsqueeze(0), activations).squeeze(0)
        return super()._computed(x, activations)


@register_module(nn.Conv1d)
class QConv1d(_Convolution, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.Conv1d with a quantized weight and, if asked for, quantized inputs; y is a float tensor."""


@register_module(nn.Conv2d)
class QConv2d(_Convolution, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.Conv2d with a quantized weight and, if asked for, quantized inputs; channels_last stays so."""


@register_module(nn.Conv3d)
class QConv3d(_Convolution, nn.Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.Conv3d with a quantized weight and, if asked for, quantized inputs."""


class _Transposed(_Convolution):
    """A weight [I, O / groups, *kernel], quantized as [O, I / groups * prod(kernel)]: a scale belongs to an output."""

    convolve: ClassVar[Callable[..., Tensor]]

    def matrix(self, weight: Tensor, name: str = "weight") -> Tensor:
        inputs, outputs = self.in_channels // self.groups, self.out_channels // self.groups
        by_group = weight.reshape(self.groups, inputs, outputs, *self.kernel_size)
        return by_group.transpose(1, 2).reshape(self.out_channels, -1)

    def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
        inputs, outputs = self.in_channels // self.groups, self.out_channels // self.groups
        by_group = matrix.reshape(self.groups, outputs, inputs, *self.kernel_size)
        return by_group.transpose(1, 2).reshape(self.in_channels, outputs, *self.kernel_size)

    def has_kernels(self, name: str = "weight") -> bool:
        return False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        geometry = (self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation)
        output_padding = self._output_padding(input, output_size, *geometry)
        compute = partial(self._computed, output_padding=output_padding)
        if recording.ACTIVE:
            return recording.recorded(self, input, compute)
        return compute(input, self._activation_spec)

    def _computed(self, x: Tensor, activations: str, output_padding: Any = 0) -> Tensor:
        if x.dim() == len(self.kernel_size) + 1:
            return self._computed(x.unsqueeze(0), activations, output_padding).squeeze(0)
        x = self.rounded(self._entered(x), activations)
        weight = self.float_weight(x.dtype)
        tail = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        return self.convolve(x, weight, bias_like(self.bias, weight), *tail)


@register_module(nn.ConvTranspose1d)
class QConvTranspose1d(_Transposed, nn.ConvTranspose1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.ConvTranspose1d with a quantized weight and, if asked for, quantized inputs."""

    convolve = staticmethod(F.conv_transpose1d)


@register_module(nn.ConvTranspose2d)
class QConvTranspose2d(_Transposed, nn.ConvTranspose2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.ConvTranspose2d with a quantized weight and, if asked for, quantized inputs."""

    convolve = staticmethod(F.conv_transpose2d)


@register_module(nn.ConvTranspose3d)
class QConvTranspose3d(_Transposed, nn.ConvTranspose3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.ConvTranspose3d with a quantized weight and, if asked for, quantized inputs."""

    convolve = staticmethod(F.conv_transpose3d)
