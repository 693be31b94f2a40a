"""How each module of a saved model is quantized, as a config's file holds it: kinds, and which module has which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.errors import InvalidQuantizationMap
from fxquant.model import quantization_map
from fxquant.nn import QModule

SCALES = ("input_scale", "output_scale")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TEXTS = ("weights", "activations", "algorithm", "calibratable")
_YES_NO = ("calibratable", "frozen", *SCALES)


@dataclass(frozen=True)
class ModuleTable:
    """The table of a model.

    dtype    what most of the model computes in.
    kinds    texts: weights, activations, algorithm, calibratable (of `fxquant.quantization_map`), frozen, input_scale,
             output_scale (yes or no); and dtype, where a module computes in another.
    modules  by path: the place of its kind.
    tied     by path of a module that uses the codes of another: the path of that one.
    """

    dtype: str
    kinds: tuple[dict[str, str], ...]
    modules: dict[str, int]
    tied: dict[str, str]

    @staticmethod
    def of(model: nn.Module, dtype: torch.dtype) -> ModuleTable:
        """The table of a quantized model that is to be saved and mostly computes in `dtype`."""
        kinds: dict[tuple[tuple[str, str], ...], int] = {}
        modules: dict[str, int] = {}
        tied: dict[str, str] = {}
        held = dict(model.named_modules())
        for path, fields in quantization_map(model).items():
            module = held[path]
            assert isinstance(module, QModule)
            if "tied_to" in fields:
                tied[path] = fields["tied_to"]
            kind = {name: fields[name] for name in _TEXTS}
            kind["frozen"] = _yes(module.is_frozen)
            kind |= {scale: _yes(getattr(module, scale) is not None) for scale in SCALES}
            if module.quantization.weights is not None and module.compute_dtype is not dtype:
                kind["dtype"] = _name(module.compute_dtype)
            modules[path] = kinds.setdefault(tuple(kind.items()), len(kinds))
        return ModuleTable(_name(dtype), tuple(dict(kind) for kind in kinds), modules, tied)

    def kind(self, path: str) -> dict[str, str]:
        """The kind of the module of that path."""
        return self.kinds[self.modules[path]]

    def map_entry(self, path: str) -> dict[str, str]:
        """What a quantization map has for that path, without what it is tied to."""
        return {name: self.kind(path)[name] for name in _TEXTS}

    def compute_dtype(self, path: str, dtype: torch.dtype) -> torch.dtype:
        """What the module computes in, in a model that is loaded in `dtype`."""
        own = self.kind(path).get("dtype")
        return dtype if own is None else DTYPES[own]

    def as_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "kinds": list(self.kinds), "modules": self.modules, "tied": self.tied}

    @staticmethod
    def from_json(told: Mapping[str, Any]) -> ModuleTable:
        """The inverse of `as_json`. Raises `InvalidQuantizationMap`, which names all that is wrong."""
        parts = {"dtype": str, "kinds": list, "modules": dict, "tied": dict}
        if not isinstance(told, Mapping) or any(type(told.get(name)) is not kind for name, kind in parts.items()):
            raise InvalidQuantizationMap(["it has not the parts dtype, kinds, modules and tied"])
        kinds, modules, tied = told["kinds"], told["modules"], told["tied"]
        problems = [f"kind {i}: {problem}" for i, kind in enumerate(kinds) if (problem := _problem(kind))]
        problems += [
            f"{path!r}: it has no kind {kind!r}"
            for path, kind in modules.items()
            if type(kind) is not int or not 0 <= kind < len(kinds)
        ]
        problems += [
            f"{path!r}: tied to {str(to)!r}, which is not there" for path, to in tied.items() if to not in modules
        ]
        problems += [f"{path!r}: tied, and not there" for path in tied if path not in modules]
        problems += [f"{path!r}: tied to one that is tied itself" for path, to in tied.items() if to in tied]
        if problems:
            raise InvalidQuantizationMap(problems)
        return ModuleTable(told["dtype"], tuple(kinds), modules, tied)


def _problem(kind: Any) -> str:
    """What is wrong with a kind, in words."""
    if not isinstance(kind, dict) or not all(isinstance(text, str) for text in kind.values()):
        return "it is no object of texts"
    if missing := [name for name in (*_TEXTS, *_YES_NO) if name not in kind]:
        return f"it has no {', '.join(missing)}"
    if strange := [name for name in kind if name not in (*_TEXTS, *_YES_NO, "dtype")]:
        return f"{', '.join(strange)} are not known"
    if unclear := [name for name in _YES_NO if kind[name] not in ("yes", "no")]:
        return f"{', '.join(unclear)} are neither yes nor no"
    return "" if kind.get("dtype", "float32") in DTYPES else f"{kind['dtype']!r} is no dtype to compute in"


def _yes(what: bool) -> str:
    return "yes" if what else "no"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
