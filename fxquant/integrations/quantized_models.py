"""Whole models by Quanto's method names, whichever library's: thin, over `FxQuantConfig`; models stay what they are."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from fxquant.errors import InvalidCheckpoint, NotAModule
from fxquant.integrations.recipes import METHOD, Recipe
from fxquant.model import freeze, quantize
from fxquant.spec import ConfigLike, QuantConfig


class QuantizedModel(ABC):
    """What quantizes, saves and loads models of a library. It is never made: its methods give ordinary models."""

    # The options of from_pretrained that say where a folder is.
    _HUB_OPTIONS: ClassVar[tuple[str, ...]] = ("cache_dir", "local_files_only", "revision", "subfolder", "token")

    @classmethod
    def quantize(
        cls, model: Any, preset: ConfigLike = None, *, device: torch.device | str | None = None, **fields: Any
    ) -> Any:
        """Quantize a model of the library in place and freeze it; returns the model.

        preset, fields: what `FxQuantConfig` takes; device: where the model goes, module by module. The model's own
        `save_pretrained` then writes quantized weights and their config.

        Raises:
            NotAModule: it is no model of the library; and what `fxquant.quantize` and `fxquant.freeze` raise.
        """
        if not cls._is_model(model):
            raise NotAModule(model)
        recipe = Recipe(preset, **fields).recipe
        quantize(model, recipe, device=device)
        freeze(model)
        return cls._attach(model, recipe)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Load a folder that a quantized model was saved to; the options are those of the library's from_pretrained.

        Raises:
            InvalidCheckpoint: the folder holds no model that fxquant quantized.
        """
        place = os.fspath(folder)  # diffusers' AutoModel takes no Path
        hub = {name: options[name] for name in cls._HUB_OPTIONS if name in options}
        if (cls._quantization_of(place, hub) or {}).get("quant_method") != METHOD:
            raise InvalidCheckpoint(folder, "its config.json has no quantization_config of fxquant's")
        return cls._loader().from_pretrained(place, **options)

    @staticmethod
    @abstractmethod
    def save_pretrained(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
        """`model.save_pretrained(folder, **options)`, all or nothing, and a model card."""

    @staticmethod
    @abstractmethod
    def _is_model(model: Any) -> bool:
        """Whether it is a model of the library."""

    @staticmethod
    @abstractmethod
    def _attach(model: Any, recipe: QuantConfig) -> Any:
        """The quantized model, which its library saves from now on with its config."""

    @staticmethod
    @abstractmethod
    def _quantization_of(folder: str, hub: dict[str, Any]) -> dict[str, Any] | None:
        """The quantization_config of a folder's config.json, if it has one."""

    @classmethod
    @abstractmethod
    def _loader(cls) -> Any:
        """The class of the library whose from_pretrained loads."""
