"""fxquant: a quantizer for PyTorch, built as compiler passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxquant.backend import QuantizingBackend, backend
from fxquant.calibration import Calibration
from fxquant.checkpoint import load, save
from fxquant.compiled import CompiledModel, compile, explain, refresh, tune
from fxquant.model import QuantizeReport, freeze, memory_footprint, quantization_map, quantize, requantize
from fxquant.model.lora import peft_config
from fxquant.nn import QModule, register_module
from fxquant.report import ModelReport
from fxquant.spec import FLOAT8_E4M3FN as qfloat8
from fxquant.spec import FLOAT8_E4M3FN as qfloat8_e4m3fn
from fxquant.spec import FLOAT8_E4M3FNUZ as qfloat8_e4m3fnuz
from fxquant.spec import FLOAT8_E5M2 as qfloat8_e5m2
from fxquant.spec import INT2 as qint2
from fxquant.spec import INT4 as qint4
from fxquant.spec import INT8 as qint8
from fxquant.spec import PRESETS, LinearSpec, QuantConfig, TensorSpec
from fxquant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from fxquant.integrations.diffusers_compile import compile_pipeline as compile_pipeline
    from fxquant.integrations.diffusers_models import QuantizedDiffusersModel as QuantizedDiffusersModel
    from fxquant.integrations.transformers import FxQuantConfig as FxQuantConfig
    from fxquant.integrations.transformers_models import QuantizedModelForCausalLM as QuantizedModelForCausalLM

__all__ = [
    "PRESETS",
    "Calibration",
    "CompiledModel",
    "LinearSpec",
    "ModelReport",
    "QModule",
    "QuantConfig",
    "QuantizeReport",
    "QuantizedTensor",
    "QuantizingBackend",
    "TensorSpec",
    "backend",
    "compile",
    "explain",
    "freeze",
    "load",
    "memory_footprint",
    "peft_config",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "quantization_map",
    "quantize",
    "refresh",
    "register_module",
    "requantize",
    "save",
    "tune",
]


def __getattr__(name: str) -> Any:
    """What needs other libraries, imported when it is asked for. Raises `PackageMissing` where they are not there."""
    from fxquant.integrations import LAZY, lazy

    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lazy(name)
