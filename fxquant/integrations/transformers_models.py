"""Quantized transformers models by Quanto's method names: thin, over `FxQuantConfig`; models stay what they are."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fxquant.errors import InvalidCheckpoint, NotAModule
from fxquant.integrations.transformers import FxQuantConfig, attach
from fxquant.integrations.transformers_saving import save_pretrained
from fxquant.model import freeze, quantize
from fxquant.spec import ConfigLike

_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


class QuantizedTransformersModel:
    """What quantizes, saves and loads models of transformers. It is never made: its methods give ordinary models."""

    auto_class: ClassVar[Any] = AutoModel

    @classmethod
    def quantize(
        cls, model: Any, preset: ConfigLike = None, *, device: torch.device | str | None = None, **fields: Any
    ) -> Any:
        """Quantize a transformers model in place and freeze it; returns the model.

        preset, fields: what `FxQuantConfig` takes; device: where the model goes, module by module. The model's own
        `save_pretrained` then writes quantized weights and their config.

        Raises what `fxquant.quantize` and `fxquant.freeze` raise.
        """
        if not hasattr(model, "save_pretrained"):
            raise NotAModule(model)
        recipe = FxQuantConfig(preset, **fields).recipe
        quantize(model, recipe, device=device)
        freeze(model)
        return attach(model, recipe)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Load a folder that a quantized model was saved to; the options are those of transformers' from_pretrained.

        Raises:
            InvalidCheckpoint: the folder holds no model that fxquant quantized.
        """
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        told = getattr(AutoConfig.from_pretrained(folder, **hub), "quantization_config", None) or {}
        if told.get("quant_method") != "fxquant":
            raise InvalidCheckpoint(folder, "its config.json has no quantization_config of fxquant's")
        return cls.auto_class.from_pretrained(folder, **options)

    @staticmethod
    def save_pretrained(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
        """See `fxquant.integrations.transformers_saving.save_pretrained`."""
        save_pretrained(model, folder, **options)


class QuantizedModelForCausalLM(QuantizedTransformersModel):
    """The same for models that generate text."""

    auto_class = AutoModelForCausalLM
