"""QLinear, and the transposed linear that GPT-2 has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxquant.nn import kernels
from fxquant.nn.base import QModule
from fxquant.nn.registry import register_late, register_module


@register_module(nn.Linear)
class QLinear(QModule, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """nn.Linear with a quantized weight [N, K] and, if asked for, quantized inputs; y is a float tensor."""

    def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
        return matrix

    def has_int8_kernels(self, name: str = "weight") -> bool:
        return kernels.multiplies_rows(self)

    def has_tile_kernels(self, name: str = "weight") -> bool:
        return True

    def float_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, bias_like(self.bias, weight))

    def kernel_product(self, x: Tensor, activations: str) -> Tensor:
        return kernels.linear(self, x, self.bias, activations)


@register_late("transformers.pytorch_utils", "Conv1D")
class QConv1D(QModule):
    """transformers' Conv1D: a linear whose weight is [K, N]."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:  # as callers name it
        return super().forward(x)

    def matrix(self, weight: Tensor, name: str = "weight") -> Tensor:
        return weight.t()

    def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
        return matrix.t()

    def has_int8_kernels(self, name: str = "weight") -> bool:
        return kernels.multiplies_rows(self)

    def has_tile_kernels(self, name: str = "weight") -> bool:
        return True

    def float_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight.t(), bias_like(self.bias, weight))

    def kernel_product(self, x: Tensor, activations: str) -> Tensor:
        return kernels.linear(self, x, self.bias, activations)


def bias_like(bias: Any, weight: Tensor) -> Any:
    """The bias in the weight's dtype, which differs under autocast or of a decoded weight."""
    return bias if bias is None or bias.dtype is weight.dtype else bias.to(weight.dtype)
