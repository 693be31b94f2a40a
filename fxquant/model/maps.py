"""quantization_map: how a model is quantized, as data that JSON holds; and the reading of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from fxquant.errors import FxQuantError, InvalidQuantizationMap, NotAModule
from fxquant.nn import QModule, quantized_class, why_none
from fxquant.spec import LinearSpec, TensorSpec

QuantizationMap = Mapping[str, Mapping[str, str]]
NONE = "none"
FIELDS = ("weights", "activations", "algorithm", "calibratable", "tied_to")


@dataclass(frozen=True)
class MapEntry:
    """One module of a map, found in a model: all its paths, what it becomes, and whose weight it shares."""

    module: nn.Module
    paths: tuple[str, ...]
    kind: type[QModule]
    spec: LinearSpec
    calibratable: bool
    owner: nn.Module | None = None

    def prefixes(self) -> Iterator[str]:
        """What the module's keys in a state dict start with."""
        return (f"{path}." if path else "" for path in self.paths)


def quantization_map(model: nn.Module) -> dict[str, dict[str, str]]:
    """How each quantized module of `model` is quantized, by path: what `requantize` needs beside the state dict.

    weights, activations  texts of `TensorSpec`, or 'none'.
    algorithm             how codes are chosen; matters where weights are still float.
    calibratable          'yes': a Calibration makes the activations static; else 'no'.
    tied_to               only of a frozen module that uses the weight of another: the path of that one.

    A shared module is listed once, under its first path.

    Raises:
        NotAModule: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        if not _is_quantized(module):
            continue
        spec = module.quantization
        found[path] = {
            "weights": NONE if spec.weights is None else str(spec.weights),
            "activations": NONE if spec.activations is None else str(spec.activations),
            "algorithm": spec.algorithm,
            "calibratable": "yes" if module.calibratable else "no",
        }
        if module._owner and id(module._owner[0]) in paths:
            found[path]["tied_to"] = paths[id(module._owner[0])]
    return found


def read_map(model: nn.Module, quantization_map: QuantizationMap) -> list[MapEntry]:
    """The entries of a map, each with its module in `model`.

    Raises `InvalidQuantizationMap`, which names all that is wrong: an empty map, entries that name no module or one
    that cannot be quantized so, texts that are no specs, modules that are quantized and not in the map.
    """
    if not isinstance(quantization_map, Mapping) or not quantization_map:
        raise InvalidQuantizationMap(["it is empty: nothing would be quantized"])
    paths: dict[int, list[str]] = {}
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules[path] = module
        paths.setdefault(id(module), []).append(path)
    problems: list[str] = []
    entries: dict[int, MapEntry] = {}
    for path, fields in quantization_map.items():
        if path not in modules:
            problems.append(f"{path!r}: the model has no module of that name")
            continue
        entry = _entry(modules, path, fields, tuple(paths[id(modules[path])]))
        if isinstance(entry, str):
            problems.append(f"{path!r}: {entry}")
        elif (met := entries.setdefault(id(entry.module), entry)).spec != entry.spec:
            problems.append(f"{path!r}: the same module as {met.paths[0]!r}, which is to be {met.spec}")
    for path, module in modules.items():
        if _is_quantized(module) and not problems and id(module) not in entries:
            problems.append(f"{path!r} is quantized as {module.quantization}, and the map does not name it")
    if problems:
        raise InvalidQuantizationMap(problems)
    return list(entries.values())


def _is_quantized(module: nn.Module) -> TypeGuard[QModule]:
    """Whether it is a quantized module with something quantized in it."""
    spec = module.quantization if isinstance(module, QModule) else None
    return spec is not None and not (spec.weights is None and spec.activations is None)


def _entry(
    modules: Mapping[str, nn.Module], path: str, fields: Mapping[str, str], paths: tuple[str, ...]
) -> MapEntry | str:
    """The entry, or what is wrong with it in words."""
    strange = [f for f in fields if f not in FIELDS] if isinstance(fields, Mapping) else [fields]
    if strange:
        return f"its fields are {', '.join(FIELDS)}, not {strange}"
    module = modules[path]
    kind = type(module) if isinstance(module, QModule) else quantized_class(type(module))
    if kind is None:
        return why_none(type(module)) or f"{type(module).__name__} has no quantized class (see register_module)"
    try:
        weights, activations = (_spec(fields.get(side, NONE)) for side in ("weights", "activations"))
        spec = LinearSpec(weights, activations, fields.get("algorithm", "auto"))
    except FxQuantError as error:
        return str(error)
    if weights is None and activations is None:
        return "neither weights nor activations are quantized"
    owner = modules.get(fields["tied_to"]) if "tied_to" in fields else None
    if "tied_to" in fields and owner is None:
        return f"it is tied to {fields['tied_to']!r}, and the model has no module of that name"
    if owner is None and (problem := kind.unfit(module, spec)):
        return problem
    return MapEntry(module, paths, kind, spec, fields.get("calibratable") == "yes", owner)


def _spec(text: str) -> TensorSpec | None:
    return None if text == NONE else TensorSpec.parse(text)
