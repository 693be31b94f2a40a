"""load: a quantized model from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxquant.checkpoint import torchao
from fxquant.checkpoint.description import FILE, read_description
from fxquant.checkpoint.json_files import read_json
from fxquant.checkpoint.reading import Folder, read_folder
from fxquant.checkpoint.skeletons import cast, made_on_meta, made_with_buffers, non_persistent
from fxquant.errors import BuffersOnMeta, FxQuantError, InvalidCheckpoint, InvalidOption, NotAModule
from fxquant.model import requantize

QUANTO_MAP = "quanto_qmap.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Contents(NamedTuple):
    """What a folder holds, as `requantize` takes it.

    dtypes  what each quantized module computes in, by path; buffers: those of floats that no state dict holds.
    """

    tensors: dict[str, Tensor]
    modules: dict[str, dict[str, str]]
    dtypes: dict[str, torch.dtype]
    buffers: dict[str, torch.dtype]


@torch.no_grad()
def load(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    factory: Callable[[], nn.Module] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a quantized model that `save` wrote; it computes the same, bit for bit, as the one that was saved.

    model      a float model of the same modules, also on the meta device, to be filled in place; or
    factory    what makes one: it is called under `torch.device("meta")`, so that no float weight takes memory; and once
               more if it makes buffers that no state dict holds and that cannot be computed again. The model is in eval
               mode.
    device     where it goes; by default a model's tensors stay, and what is on meta goes to the CPU.
    dtype      float32, bfloat16 or float16: what parameters and buffers of the state dict become and the model computes
               in. By default each has the dtype that was saved. Codes, their scales and other buffers stay.

    Folders of optimum-quanto (`quanto_qmap.json`) and safetensors of torchao (int8, intx, int4, float8) are read too.
    Files are mapped: they must not be cut while they are read; after that the model has none of them.

    Returns the model: `model` itself, if that was given.

    Raises:
        InvalidCheckpoint: a file is missing, damaged, or not what it says; it is named, and nothing has been changed.
        InvalidQuantizationMap, StateDictMismatch: the model is another one; all keys that are missing, unexpected or
            wrong are in the error. Nothing has been changed.
        BuffersOnMeta: a `model` on meta has buffers that no state dict holds, and cannot compute them: give a factory.
        InvalidOption: not just one of model and factory, or another dtype.
    """
    if (model is None) == (factory is None):
        raise InvalidOption("model", model, "load takes one of model= and factory=")
    if model is not None and not isinstance(model, nn.Module):
        raise NotAModule(model)
    if dtype is not None and dtype not in _FLOATS:
        raise InvalidOption("dtype", dtype, f"it takes {', '.join(map(str, _FLOATS))}")
    contents = _contents(read_folder(directory))
    if model is not None:
        _fill(model, contents, device, dtype)
        return model
    assert factory is not None
    made = made_on_meta(factory)
    try:
        _fill(made, contents, device, dtype)
    except BuffersOnMeta:
        made = made_with_buffers(factory)
        _fill(made, contents, device, dtype)
    return made.eval()


def _contents(folder: Folder) -> Contents:
    """What a folder holds, whoever wrote it."""
    if (folder.path / FILE).exists():
        told = read_description(folder.path / FILE)
        tensors = dict(folder.tensors)
        for key, other in told.shared.items():
            if other not in folder.tensors or key in folder.tensors:
                raise InvalidCheckpoint(folder.path / FILE, f"it says that {key!r} is stored as {other!r}")
            tensors[key] = folder.tensors[other]
        _check_specs(folder.path / FILE, tensors, told.weights)
        return Contents(tensors, told.modules, told.dtypes, told.buffers)
    if (folder.path / QUANTO_MAP).exists():
        modules = _quanto_map(folder.path / QUANTO_MAP)
        scales = {path: folder.tensors.get(f"{path}.weight._scale") for path in modules}
        dtypes = {path: scale.dtype for path, scale in scales.items() if scale is not None and scale.dtype in _FLOATS}
        return Contents(folder.tensors, modules, dtypes, {})
    if torchao.is_torchao(folder.metadata):
        ours = torchao.from_torchao(folder.path, folder.tensors, folder.metadata)
        return Contents(ours.tensors, ours.modules, ours.dtypes, {})
    raise InvalidCheckpoint(folder.path / FILE, "it is not there, nor is a map of Quanto's or a header of torchao's")


def _check_specs(path: Path, tensors: Mapping[str, Tensor], weights: Mapping[str, Mapping[str, object]]) -> None:
    """The spec beside the codes of each weight is the one that the description gives, and there is one for each.

    Specs are texts: of a weight uint8 [L]; of one that holds the matrices of experts [experts, L], all the same.
    """
    for key, fields in weights.items():
        spec = tensors.get(f"{key}_spec")
        text = torch.tensor(list(str(fields["spec"]).encode()), dtype=torch.uint8)
        if spec is None or spec.dtype is not torch.uint8 or spec.dim() not in (1, 2) or not spec.numel():
            raise InvalidCheckpoint(path, f"weight {key!r} is {fields['spec']}, and the spec of its codes is lost")
        if spec.shape[-1] != len(text) or not bool((spec == text).all()):
            raise InvalidCheckpoint(path, f"weight {key!r} is {fields['spec']}, and its codes are of another spec")
    for key in tensors:
        name = key.removesuffix("_spec")
        if name != key and f"{name}_codes" in tensors and name not in weights and tensors[key].numel() > 1 << 10:
            raise InvalidCheckpoint(path, f"it does not know the weight {name!r}")


def _quanto_map(path: Path) -> dict[str, dict[str, str]]:
    told = read_json(path)
    for module, fields in told.items():
        if not isinstance(fields, dict) or not all(isinstance(text, str) for text in fields.values()):
            raise InvalidCheckpoint(path, f"its entry {module[:80]!r} is no object of texts")
    return told


def _fill(model: nn.Module, contents: Contents, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Quantize the model as the contents say, and load them: all or nothing."""
    undo = cast(model, contents.tensors, contents.dtypes, dtype)
    try:
        requantize(model, contents.tensors, contents.modules, device)
    except FxQuantError:
        undo()
        raise
    if dtype is not None:
        return
    for path, home in non_persistent(model):
        wanted = contents.buffers.get(path)
        if wanted is not None:
            home.put(home.tensor.to(wanted))
