"""The model door: quantize, freeze, and what a quantized model can tell of itself."""

from __future__ import annotations

from fxquant.model.freezing import freeze, memory_footprint
from fxquant.model.maps import quantization_map
from fxquant.model.quantizing import quantize
from fxquant.model.quanto import to_quanto
from fxquant.model.records import QuantizeReport, QuantizeRow
from fxquant.model.requantizing import requantize

__all__ = [
    "QuantizeReport",
    "QuantizeRow",
    "freeze",
    "memory_footprint",
    "quantization_map",
    "quantize",
    "requantize",
    "to_quanto",
]
