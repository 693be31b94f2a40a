"""A folder of safetensors as one state dict: every file of it checked, nothing read yet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fxquant.checkpoint.folders import recover
from fxquant.checkpoint.json_files import read_json
from fxquant.checkpoint.tensor_files import read_file
from fxquant.errors import InvalidCheckpoint

_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Folder(NamedTuple):
    """path; the tensors of all its files by key, mapped; and what the files' headers say beside them, as one."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_folder(directory: str | os.PathLike[str]) -> Folder:
    """Map the safetensors of a folder: one file, or those that its index names.

    Raises:
        InvalidCheckpoint: there is no such folder or file, or a file is not what it should be; the file is named.
    """
    folder = Path(directory)
    recover(folder)
    if not folder.is_dir():
        raise InvalidCheckpoint(folder, "there is no such folder")
    for single in _SINGLE:
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
        if (folder / single).exists():
            file = read_file(folder / single)
            return Folder(folder, file.tensors, file.metadata)
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    met = f"it holds {pickles[0]!r}, a pickle, which can run code and is not read" if pickles else "it is not there"
    raise InvalidCheckpoint(folder / _SINGLE[0], met)


def _read_shards(folder: Path, index: Path) -> Folder:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(index, "it has no weight_map")
    names: dict[str, None] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise InvalidCheckpoint(index, f"it puts {key!r} in {str(name)[:80]!r}, no safetensors file of this folder")
        names[name] = None
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in names:
        file = read_file(folder / name)
        for key in file.tensors:
            if weight_map.get(key) != name:
                raise InvalidCheckpoint(index, f"{name} holds {key!r}, which the index puts in {weight_map.get(key)!r}")
        tensors |= file.tensors
        metadata |= file.metadata
    if lost := [key for key in weight_map if key not in tensors]:
        raise InvalidCheckpoint(index, f"it puts {lost[0]!r} in {weight_map[lost[0]]!r}, which does not hold it")
    return Folder(folder, tensors, metadata)


def _is_plain(name: str) -> bool:
    """Whether it is the name of a safetensors file in the same folder, on any system."""
    return name.endswith(".safetensors") and not name.startswith(".") and not any(c in name for c in "/\\:\0")
