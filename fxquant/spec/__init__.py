"""What to quantize, and to what: pure data, frozen, printable and parseable."""

from __future__ import annotations

from fxquant.spec.config import QuantConfig
from fxquant.spec.formats import (
    ALIASES,
    CHANNEL,
    FLOAT8_E4M3FN,
    FLOAT8_E4M3FNUZ,
    FLOAT8_E5M2,
    FLOAT8_E5M2FNUZ,
    FORMATS,
    FP4_E2M1,
    FP5_E2M2,
    FP6_E2M3,
    FP6_E3M2,
    INT2,
    INT4,
    INT8,
    SAMPLE,
    TENSOR,
    TOKEN,
    Granularity,
    NumberFormat,
    block,
    group,
    number_format,
)
from fxquant.spec.linears import LinearSpec
from fxquant.spec.presets import PRESETS, linear_spec, preset
from fxquant.spec.resolve import ConfigLike, resolve_config
from fxquant.spec.rules import Decision, Rule
from fxquant.spec.tensors import NAMED_SPECS, TensorSpec

__all__ = [
    "ALIASES",
    "CHANNEL",
    "FLOAT8_E4M3FN",
    "FLOAT8_E4M3FNUZ",
    "FLOAT8_E5M2",
    "FLOAT8_E5M2FNUZ",
    "FORMATS",
    "FP4_E2M1",
    "FP5_E2M2",
    "FP6_E2M3",
    "FP6_E3M2",
    "INT2",
    "INT4",
    "INT8",
    "NAMED_SPECS",
    "PRESETS",
    "SAMPLE",
    "TENSOR",
    "TOKEN",
    "ConfigLike",
    "Decision",
    "Granularity",
    "LinearSpec",
    "NumberFormat",
    "QuantConfig",
    "Rule",
    "TensorSpec",
    "block",
    "group",
    "linear_spec",
    "number_format",
    "preset",
    "resolve_config",
]
