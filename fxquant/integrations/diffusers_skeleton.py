"""A diffusers model on meta as a saved one was, and the stored parts of its weights until all of one have come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.integrations.module_tables import SCALES, ModuleTable
from fxquant.integrations.transformers_skeleton import become
from fxquant.model.maps import read_map
from fxquant.model.quantizing import switch_off_fast_paths
from fxquant.nn import QModule
from fxquant.nn.forms import STORED, stored_parts
from fxquant.spec import TensorSpec

_LONGEST_FIRST = sorted(STORED, key=len, reverse=True)  # `tensor_scale` before `scale`


def make_skeleton(model: nn.Module, table: ModuleTable, dtype: torch.dtype) -> set[str]:
    """Quantize the modules of a model on meta as the table says; their weights stay float, on meta.

    dtype: what the model is loaded in. Returns the paths of modules whose codes must come.

    Raises `InvalidQuantizationMap`: the table does not fit the model.
    """
    entries = {path: table.map_entry(path) for path in table.modules}
    for path, owner in table.tied.items():
        entries[path]["tied_to"] = owner
    chosen = read_map(model, entries)
    for entry in chosen:
        path = next(path for path in entry.paths if path in entries)
        become(entry, table.kind(path), table.compute_dtype(path, dtype))
    for entry in chosen:
        if isinstance(entry.module, QModule) and isinstance(entry.owner, QModule):
            entry.module.follow(entry.owner)
    switch_off_fast_paths(model)
    return {path for path in table.modules if path not in table.tied and table.kind(path)["frozen"] == "yes"}


class StoredParts:
    """The parts of frozen weights as files have them, `block.weight_codes` and the like, by the weight's name."""

    def __init__(self, table: ModuleTable) -> None:
        self._paths = set(table.modules)
        self._waiting: dict[str, dict[str, Tensor]] = {}

    def float_names(self, keys: Iterable[str]) -> list[str]:
        """Each key, or the name of the weight that it is a part of, once."""
        return list(dict.fromkeys(name for key in keys for name, _ in [self._split(key)]))

    def take(
        self, state_dict: Mapping[str, Any], model: nn.Module
    ) -> tuple[dict[str, Any], list[tuple[str, str, dict[str, Tensor]]]]:
        """What is no part; and path, name and parts of each weight of which all have come."""
        rest: dict[str, Any] = {}
        complete: list[tuple[str, str, dict[str, Tensor]]] = []
        for key, tensor in state_dict.items():
            weight, part = self._split(key)
            if not part:
                rest[key] = tensor
                continue
            parts = self._waiting.setdefault(weight, {})
            parts[part] = tensor
            path, _, name = weight.rpartition(".")
            module = model.get_submodule(path)
            if isinstance(module, QModule) and parts.keys() >= set(_wanted(module)):
                complete.append((path, name, self._waiting.pop(weight)))
        return rest, complete

    def _split(self, key: str) -> tuple[str, str]:
        """The weight's name and the part's; the part is empty for what is none."""
        path, _, tail = key.rpartition(".")
        if path not in self._paths or tail in SCALES:
            return key, ""
        part = next((part for part in _LONGEST_FIRST if tail.endswith(f"_{part}")), "")
        return (key.removesuffix(f"_{part}"), part) if part else (key, "")


def _wanted(module: QModule) -> list[str]:
    return stored_parts(TensorSpec.parse(module._weight_spec))
