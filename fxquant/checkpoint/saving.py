"""save: a quantized model as a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.checkpoint.description import FILE, FORMAT, Description, describe
from fxquant.checkpoint.folders import replaced
from fxquant.checkpoint.json_files import write_json
from fxquant.checkpoint.stored import Stored, pieces_of, plan
from fxquant.checkpoint.tensor_writer import FileWriter
from fxquant.errors import InvalidOption, NotAModule, NothingQuantized
from fxquant.numerics.threads import one_thread

INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


@torch.no_grad()
def save(model: nn.Module, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Write a quantized model to a folder: the old folder stays whole until the new one is, and then it is replaced.

    The folder holds `model.safetensors`, or shards of at most `max_shard_size` (bytes, or '500MB', '5GB') and
    `model.safetensors.index.json`, in Hugging Face's layout; and `fxquant.json`, which says how each module and each
    weight is quantized (docs/saving.md). Other files of an old folder are kept. Codes are stored packed, the same on
    every device; tied and shared tensors once. Memory: the model, and a few layers in packed form.

    A model that torch.compile wraps is saved as the one it wraps; what `fxquant.compile` quantizes is no part of that.

    Raises:
        NotAModule: `model` is no module.
        NothingQuantized: no module of it is quantized: quantize it first.
        NotStorable: it holds something that safetensors cannot.
        SaveFailed: the folder cannot be written (a full disk, say). What was there before is as it was.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise NotAModule(model)
    stored = plan(inner)
    description = describe(inner, stored.shared)
    if not description.modules:
        raise NothingQuantized("save")
    shards, index = _shards(stored, max_shard_size)
    with one_thread(), replaced(directory, is_ours) as folder:
        _write_tensors(inner, stored, shards, folder)
        if len(shards) > 1:
            write_json(folder / INDEX, index)
        _write_description(folder, description)


def is_ours(name: str) -> bool:
    """Whether a save writes a file of that name, or would if the model had more or fewer shards."""
    return name in (FILE, INDEX) or _SHARD.fullmatch(name) is not None


def _shards(stored: Stored, max_shard_size: int | str) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Keys by file, and the index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split = split_torch_state_dict_into_shards(
            {key: tensor.detach().to("meta") for key, tensor in stored.tensors.items()},
            filename_pattern=_PATTERN,
            max_shard_size=max_shard_size,
        )
    except (TypeError, ValueError) as error:
        raise InvalidOption(
            "max_shard_size", max_shard_size, f"it takes bytes, or a text such as '5GB': {error}"
        ) from error
    index = {"metadata": {"format": "pt", **split.metadata}, "weight_map": split.tensor_to_filename}
    return {name: keys for name, keys in split.filename_to_tensors.items() if keys}, index


def _write_tensors(model: nn.Module, stored: Stored, shards: Mapping[str, list[str]], folder: Path) -> None:
    """Each tensor into its file, piece by piece."""
    metadata = {"format": "pt", "fxquant": json.dumps({"format": FORMAT})}
    homes = {key: name for name, keys in shards.items() for key in keys}
    files: dict[str, FileWriter] = {}
    try:
        for piece in pieces_of(model, stored):
            name = homes[piece.key]
            if name not in files:
                own = {key: stored.tensors[key] for key in shards[name]}
                files[name] = FileWriter(folder / name, own, metadata)
            files[name].write(*piece)
    finally:
        for file in files.values():
            file.close()


def _write_description(folder: Path, description: Description) -> None:
    write_json(folder / FILE, description.as_json())
