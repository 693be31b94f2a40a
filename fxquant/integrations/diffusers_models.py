"""Quantized diffusers models by Quanto's method names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from diffusers import AutoModel, ModelMixin

from fxquant.checkpoint.folders import replaced, sync
from fxquant.errors import NothingQuantized
from fxquant.integrations.diffusers import attach
from fxquant.integrations.quantized_models import QuantizedModel
from fxquant.model import memory_footprint
from fxquant.nn import QModule
from fxquant.spec import QuantConfig

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


class QuantizedDiffusersModel(QuantizedModel):
    """What quantizes, saves and loads models of diffusers: see `QuantizedModel`.

    base_class: the class that loads; a subclass may name one, as with Quanto. By default the folder's config says it.
    """

    base_class: ClassVar[Any] = AutoModel
    _HUB_OPTIONS = (*QuantizedModel._HUB_OPTIONS, "proxies", "force_download")

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

    @staticmethod
    def _is_model(model: Any) -> bool:
        return isinstance(model, ModelMixin)

    @staticmethod
    def _attach(model: Any, recipe: QuantConfig) -> Any:
        return attach(model, recipe)

    @staticmethod
    def _quantization_of(folder: str, hub: dict[str, Any]) -> dict[str, Any] | None:
        told: Any = AutoModel.load_config(folder, **hub)
        return told.get("quantization_config")

    @classmethod
    def _loader(cls) -> Any:
        return cls.base_class


def _is_ours(name: str) -> bool:
    """Files of an old folder that the new one has its own of, or must have none of."""
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
    return name in ("config.json", _CARD) or any(Path(name).match(pattern) for pattern in weights)
