"""A model on meta as a saved one was: quantized modules that wait for their codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fxquant.errors import InvalidQuantizationMap
from fxquant.integrations.module_tables import SCALES, ModuleTable
from fxquant.model.maps import NONE, MapEntry, read_map
from fxquant.model.quantizing import switch_off_fast_paths
from fxquant.nn import QModule, quantized_class


class Skeleton(NamedTuple):
    """awaited: paths of modules whose codes must come. renamed: paths under which codes are stored that go to another
    module: the path of that one."""

    awaited: set[str]
    renamed: dict[str, str]


def make_skeleton(model: Any, table: ModuleTable, dtype: torch.dtype) -> Skeleton:
    """Quantize the modules of a transformers model on meta as the table says; their weights stay float, on meta.

    dtype: what the model is loaded in. Modules are found where this model is the base of the saved one, or the other
    way round; those that it has not are left out, as transformers does.
    A module that the table has not, and whose weight this model ties to one of its, shares the codes.

    Raises `InvalidQuantizationMap`: the table does not fit the model.
    """
    here = {path: _path_in(model, path) for path in table.modules}
    found = {path: own for path, own in here.items() if own is not None}
    if not found:
        raise InvalidQuantizationMap(["the model has none of the modules that config.json names"])
    entries: dict[str, dict[str, str]] = {own: table.map_entry(path) for path, own in found.items()}
    renamed: dict[str, str] = {}
    for path, own in found.items():
        owner = table.tied.get(path)
        if owner is not None and (home := found.get(owner) or renamed.get(owner)) is not None:
            entries[own]["tied_to"] = home
        elif owner is not None:
            renamed[owner] = own
    saved = {own: path for path, own in found.items()}
    coded = {own for own, path in saved.items() if table.kind(path)["frozen"] == "yes"}
    _take_in_tied(model, coded, saved, entries, renamed)
    chosen = read_map(model, entries)
    for entry in chosen:
        path = saved[_known(entry, saved)]
        become(entry, table.kind(path), table.compute_dtype(path, dtype))
    for entry in chosen:
        if isinstance(entry.module, QModule) and isinstance(entry.owner, QModule):
            entry.module.follow(entry.owner)
    _untie(model, {id(entry.module) for entry in chosen if not coded.isdisjoint(entry.paths)})
    switch_off_fast_paths(model)
    return Skeleton(coded, renamed)


def _take_in_tied(
    model: Any, coded: set[str], saved: dict[str, str], entries: dict[str, dict[str, str]], renamed: dict[str, str]
) -> None:
    """Modules that no table has, because their weight was only an embedding's: they own what the embedding reads."""
    for pair in model.all_tied_weights_keys.items():
        paths = [key.rpartition(".")[0] for key in pair]
        for new, known in (paths, paths[::-1]):
            if known not in coded or new in entries or quantized_class(type(model.get_submodule(new))) is None:
                continue
            entries[new] = entries[known] | {"activations": NONE, "calibratable": "no"}
            entries[known]["tied_to"] = new
            saved[new], renamed[saved[known]] = saved[known], new
            coded.add(new)
            break


def _known(entry: MapEntry, saved: dict[str, str]) -> str:
    """The path, of those of a shared module, that the table has."""
    return next(path for path in entry.paths if path in saved)


def _path_in(model: Any, path: str) -> str | None:
    """The path in this model of a module that had `path` in the saved one."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def become(entry: MapEntry, kind: dict[str, str], dtype: torch.dtype) -> None:
    """Make a module on meta the quantized one of that kind, which computes in `dtype` and waits for its scales."""
    module: Any = entry.module
    module.__class__ = entry.kind
    module.adopt(entry.spec, entry.calibratable)
    for name in module.weight_names:
        weight = module._parameters.get(name)
        if weight is not None and weight.dtype is not dtype:
            module._parameters[name] = nn.Parameter(weight.to(dtype), requires_grad=False)
    for scale in SCALES:
        if kind[scale] == "yes":
            module._buffers[scale] = torch.empty((), dtype=torch.float32, device="meta")


def _untie(model: Any, frozen: set[int]) -> None:
    """Take ties between modules of codes off transformers' list: those that follow another have no weight to tie."""
    for pair in list(model.all_tied_weights_keys.items()):
        for path, _, name in (key.rpartition(".") for key in pair):
            module = model.get_submodule(path)
            if id(module) in frozen and isinstance(module, QModule) and name in module.weight_names:
                model.all_tied_weights_keys.pop(pair[0], None)
