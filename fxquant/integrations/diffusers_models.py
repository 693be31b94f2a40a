"""Quantized diffusers models by Quanto's method names: thin, over `FxQuantConfig`; models stay what they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoModel, ModelMixin

from fxquant.checkpoint.folders import replaced, sync
from fxquant.errors import InvalidCheckpoint, NotAModule, NothingQuantized
from fxquant.integrations.diffusers import FxQuantConfig, attach
from fxquant.integrations.recipes import METHOD
from fxquant.model import freeze, memory_footprint, quantize
from fxquant.nn import QModule
from fxquant.spec import ConfigLike

_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "proxies", "force_download")
_CARD = "README.md"
_TEXT = """---
library_name: diffusers
tags:
- fxquant
---

## Quantized by fxquant: one line before it is loaded

```python
from fxquant import FxQuantConfig  # without this line diffusers does not know how to read the folder
from diffusers import {name}

model = {name}.from_pretrained("path/to/this/folder")
```

{megabytes:.1f} MB of weights. `config.json` says how each module is quantized.
"""


class QuantizedDiffusersModel:
    """What quantizes, saves and loads models of diffusers. It is never made: its methods give ordinary models.

    base_class: the class that loads; a subclass may name one, as with Quanto. By default the folder's config says it.
    """

    base_class: ClassVar[Any] = AutoModel

    @classmethod
    def quantize(
        cls, model: Any, preset: ConfigLike = None, *, device: torch.device | str | None = None, **fields: Any
    ) -> Any:
        """Quantize a diffusers model in place and freeze it; returns the model.

        preset, fields: what `FxQuantConfig` takes; device: where the model goes, module by module. The model's own
        `save_pretrained` then writes quantized weights and their config.

        Raises what `fxquant.quantize` and `fxquant.freeze` raise.
        """
        if not isinstance(model, ModelMixin):
            raise NotAModule(model)
        recipe = FxQuantConfig(preset, **fields).recipe
        quantize(model, recipe, device=device)
        freeze(model)
        return attach(model, recipe)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Load a folder that a quantized model was saved to; the options are those of diffusers' from_pretrained.

        Raises:
            InvalidCheckpoint: the folder holds no model that fxquant quantized.
        """
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        told: Any = AutoModel.load_config(os.fspath(folder), **hub)
        if (told.get("quantization_config") or {}).get("quant_method") != METHOD:
            raise InvalidCheckpoint(folder, "its config.json has no quantization_config of fxquant's")
        return cls.base_class.from_pretrained(os.fspath(folder), **options)  # AutoModel takes no Path

    @staticmethod
    def save_pretrained(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
        """`model.save_pretrained(folder, **options)`, all or nothing, and a model card.

        The old folder stays whole until the new one is on the disk.

        Raises:
            NothingQuantized: no module of the model is quantized.
            SaveFailed: the folder cannot be written. What was there before is as it was.
        """
        if not any(isinstance(module, QModule) for module in model.modules()):
            raise NothingQuantized("save_pretrained")
        with replaced(folder, is_ours=_is_ours) as fresh:
            model.save_pretrained(fresh, **options)
            text = _TEXT.format(name=type(model).__name__, megabytes=memory_footprint(model) / 1e6)
            (fresh / _CARD).write_text(text, encoding="utf-8")
            for path in fresh.iterdir():
                sync(path)


def _is_ours(name: str) -> bool:
    """Files of an old folder that the new one has its own of, or must have none of."""
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
    return name in ("config.json", _CARD) or any(Path(name).match(pattern) for pattern in weights)
