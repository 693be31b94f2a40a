"""The references by name, to be called directly, whatever kernels have been registered since."""

from __future__ import annotations

from fxquant.ops.linear import int8_linear, int8_linear_dynamic, int8_linear_weight_only, int8_pack, int8_unpack
from fxquant.ops.quantize import dequantize, int8_quantize_per_token, quantize_dynamic, quantize_weight

__all__ = [
    "dequantize",
    "int8_linear",
    "int8_linear_dynamic",
    "int8_linear_weight_only",
    "int8_pack",
    "int8_quantize_per_token",
    "int8_unpack",
    "quantize_dynamic",
    "quantize_weight",
]
