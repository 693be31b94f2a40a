"""save_pretrained as a whole: a folder is replaced at once, with a card that says how it is to be loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from fxquant.checkpoint.folders import replaced, sync
from fxquant.errors import NothingQuantized
from fxquant.model import memory_footprint
from fxquant.nn import QModule
from fxquant.spec import QuantConfig

CARD = "README.md"
_WRITTEN = ("config.json", "generation_config.json", CARD)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5")
_TEXT = """
## Quantized by fxquant: one line before it is loaded

```python
from fxquant import FxQuantConfig  # without this line transformers loads random weights, with only a warning
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")
```

Recipe: `{recipe}`. {megabytes:.1f} MB of weights. `config.json` says how each module is quantized.
"""


def save_pretrained(
    model: Any, folder: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None, **options: Any
) -> None:
    """`model.save_pretrained(folder, **options)`, all or nothing, and a model card.

    The old folder stays whole until the new one is on the disk. source: a folder whose other files (tokenizer, license,
    chat template, its card's text) go along.

    Raises:
        NothingQuantized: no module of the model is quantized.
        SaveFailed: the folder cannot be written. What was there before is as it was.
    """
    if not any(isinstance(module, QModule) for module in model.modules()):
        raise NothingQuantized("save_pretrained")
    with replaced(folder, is_ours=_is_ours) as fresh:
        if source is not None:
            _copy_others(Path(source), fresh)
        model.save_pretrained(fresh, **options)
        _write_card(model, fresh / CARD)
        for path in fresh.rglob("*"):
            if path.is_file():
                sync(path)


def _is_ours(name: str) -> bool:
    """Files of an old folder that the new one has its own of, or must have none of."""
    return name in _WRITTEN or any(Path(name).match(pattern) for pattern in _WEIGHTS)


def _copy_others(source: Path, fresh: Path) -> None:
    """Everything but weights, and code."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, fresh / path.name)


def _write_card(model: Any, path: Path) -> None:
    """Our part, behind the front matter of a card that is there, and before its text."""
    config = model.config.quantization_config
    text = _TEXT.format(auto=_auto_class(model), recipe=_words(config.recipe), megabytes=memory_footprint(model) / 1e6)
    front, rest = "---\nlibrary_name: transformers\ntags:\n- fxquant\n---\n", ""
    if path.exists():
        rest = path.read_text(encoding="utf-8", errors="replace")
        if rest.startswith("---\n") and (end := rest.find("\n---\n", 3)) > 0:
            front, rest = rest[: end + 5], rest[end + 5 :]
    path.write_text(front + text + rest, encoding="utf-8")


def _auto_class(model: Any) -> str:
    """The auto class that makes such models, or their own class."""
    from transformers.models.auto import modeling_auto

    name, own = type(model).__name__, model.config.model_type
    for auto, mapping in (
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
    ):
        if mapping.get(own) == name:
            return auto
    return name


def _words(recipe: QuantConfig) -> str:
    spec = recipe.default_spec
    return "float" if spec is None else str(spec)
