"""fxquant: a quantizer for PyTorch, built as compiler passes."""

from __future__ import annotations

from fxquant.backend import QuantizingBackend, backend
from fxquant.compiled import CompiledModel, compile, explain, refresh
from fxquant.report import ModelReport
from fxquant.spec import PRESETS, LinearSpec, QuantConfig, TensorSpec

__all__ = [
    "PRESETS",
    "CompiledModel",
    "LinearSpec",
    "ModelReport",
    "QuantConfig",
    "QuantizingBackend",
    "TensorSpec",
    "backend",
    "compile",
    "explain",
    "refresh",
]
