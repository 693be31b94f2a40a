"""What to quantize, and to what: pure data, frozen, printable and parseable."""

from __future__ import annotations

from fxquant.spec.config import QuantConfig
from fxquant.spec.formats import (
    CHANNEL,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FORMATS,
    INT4,
    INT8,
    TENSOR,
    TOKEN,
    Granularity,
    NumberFormat,
    group,
    number_format,
)
from fxquant.spec.rules import Decision, Rule
from fxquant.spec.tensors import PRESETS, LinearSpec, TensorSpec, linear_spec, preset

__all__ = [
    "CHANNEL",
    "FLOAT8_E4M3FN",
    "FLOAT8_E5M2",
    "FORMATS",
    "INT4",
    "INT8",
    "PRESETS",
    "TENSOR",
    "TOKEN",
    "Decision",
    "Granularity",
    "LinearSpec",
    "NumberFormat",
    "QuantConfig",
    "Rule",
    "TensorSpec",
    "group",
    "linear_spec",
    "number_format",
    "preset",
]
