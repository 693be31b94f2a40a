"""Quantized transformers models by Quanto's method names."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fxquant.integrations.quantized_models import QuantizedModel
from fxquant.integrations.transformers import attach
from fxquant.integrations.transformers_saving import save_pretrained
from fxquant.spec import QuantConfig


class QuantizedTransformersModel(QuantizedModel):
    """What quantizes, saves and loads models of transformers: see `QuantizedModel`.

    auto_class: the class that loads.
    """

    auto_class: ClassVar[Any] = AutoModel
    _HUB_OPTIONS = (*QuantizedModel._HUB_OPTIONS, "trust_remote_code")

    @staticmethod
    def save_pretrained(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
        """See `fxquant.integrations.transformers_saving.save_pretrained`."""
        save_pretrained(model, folder, **options)

    @staticmethod
    def _is_model(model: Any) -> bool:
        return hasattr(model, "save_pretrained")

    @staticmethod
    def _attach(model: Any, recipe: QuantConfig) -> Any:
        return attach(model, recipe)

    @staticmethod
    def _quantization_of(folder: str, hub: dict[str, Any]) -> dict[str, Any] | None:
        return getattr(AutoConfig.from_pretrained(folder, **hub), "quantization_config", None)

    @classmethod
    def _loader(cls) -> Any:
        return cls.auto_class


class QuantizedModelForCausalLM(QuantizedTransformersModel):
    """The same for models that generate text."""

    auto_class = AutoModelForCausalLM
