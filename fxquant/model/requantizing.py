"""requantize: a quantized model from a float skeleton, a state dict and a quantization map."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxquant.errors import AlreadyFrozen, NotAModule, StateDictMismatch
from fxquant.model import quanto
from fxquant.model.maps import MapEntry, QuantizationMap, read_map
from fxquant.model.meta import materialize, restored_buffers
from fxquant.model.quantizing import switch_off_fast_paths
from fxquant.nn import QModule
from fxquant.nn.forms import STORED, stored_parts
from fxquant.spec import LinearSpec

_SCALES = ("input_scale", "output_scale")


def requantize(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    quantization_map: QuantizationMap,
    device: torch.device | str | None = None,
) -> None:
    """Quantize the modules that the map names, in place, and load the state dict; all of it, or nothing.

    model             the float model, with any weights; also on the meta device, where it takes no memory: parameters
                      and buffers then come from the state dict, in the dtypes that the model has. What no state dict
                      holds (non-persistent buffers) is computed by the model's own `_init_weights`.
    state_dict        of a quantized model, frozen or not; its tensors are copied. Of optimum-quanto too, together with
                      Quanto's own map: names and packing are recognized.
    quantization_map  what `quantization_map` gave of that model.
    device            where the model goes; by default its tensors stay, and those on meta go to the CPU.

    Raises:
        InvalidQuantizationMap: it is empty, names no module of the model, or asks for what cannot be.
        StateDictMismatch: keys are missing or unexpected, or tensors have other shapes; all of them are named.
        BuffersOnMeta: non-persistent buffers are on meta, and the model cannot compute them.
        AlreadyFrozen: a module holds codes of another kind.
    """
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    if quanto.is_quanto(quantization_map, state_dict):
        state_dict, quantization_map = quanto.from_quanto(model, state_dict, quantization_map)
    entries = read_map(model, quantization_map)
    _refuse_other_codes(entries)
    owners = _owners(entries, state_dict)
    twins = {id(entry.module): _twin(entry) for entry in entries}
    loaded = _load_twins(entries, twins, state_dict)
    floats = _float_keys(model, entries, owners, state_dict, loaded)
    buffers = restored_buffers(model)
    # Nothing can fail from here on.
    _commit(entries, twins, owners)
    target = "cpu" if device is None else device
    materialize(model, target)
    for home, values in buffers:
        home.put(values.to(target))
    model.load_state_dict({key: state_dict[key] for key in floats}, strict=False)
    switch_off_fast_paths(model)
    if device is not None:
        model.to(device)


def _refuse_other_codes(entries: list[MapEntry]) -> None:
    for entry in entries:
        module = entry.module
        if isinstance(module, QModule) and module.is_frozen and module.quantization.weights != entry.spec.weights:
            raise AlreadyFrozen(entry.paths, module.quantization, entry.spec)


def _codes_of(entry: MapEntry, state_dict: Mapping[str, Tensor]) -> str | None:
    """The prefix under which the state dict holds the codes of a module, if it does."""
    keys = ((prefix, f"{prefix}{name}_codes") for prefix in entry.prefixes() for name in entry.kind.weight_names)
    return next((prefix for prefix, key in keys if key in state_dict), None)


def _owners(entries: list[MapEntry], state_dict: Mapping[str, Tensor]) -> dict[int, nn.Module]:
    """By module: whose codes it uses, where these are another's; as the map says, or as the model ties the weights."""
    owners = {id(entry.module): entry.owner for entry in entries if entry.owner is not None}
    holders: dict[int, nn.Module] = {}
    for entry in entries:
        if _codes_of(entry, state_dict) is not None and (weight := entry.module._parameters.get("weight")) is not None:
            holders[id(weight)] = entry.module
    for entry in entries:
        weight = entry.module._parameters.get("weight")
        owner = None if weight is None else holders.get(id(weight))
        if owner is not None and owner is not entry.module and not _has_weight(entry, state_dict):
            owners[id(entry.module)] = owner
    return owners


def _has_weight(entry: MapEntry, state_dict: Mapping[str, Tensor]) -> bool:
    return _codes_of(entry, state_dict) is not None or any(f"{p}weight" in state_dict for p in entry.prefixes())


def _twin(entry: MapEntry) -> QModule:
    """The quantized module to be, apart from the model: with its weights, which codes replace, and nothing else."""
    module = entry.module
    twin = object.__new__(entry.kind)
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {name: module._parameters.get(name) for name in entry.kind.weight_names}
    own = module._buffers.items() if isinstance(module, QModule) else ()
    twin._buffers = dict(own)
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    twin.adopt(entry.spec, entry.calibratable)
    for scale in _SCALES:
        twin._buffers[scale] = None
    return twin


def _load_twins(
    entries: list[MapEntry],
    twins: Mapping[int, QModule],
    state_dict: Mapping[str, Tensor],
) -> set[str]:
    """Put the codes and scales of the state dict into the twins; the keys that they took."""
    missing: list[str] = []
    wrong: list[str] = []
    taken: set[str] = set()
    for entry in entries:
        twin, parts = twins[id(entry.module)], _parts(entry.spec)
        prefix = _codes_of(entry, state_dict) or next(iter(entry.prefixes()))
        names = [name for name in entry.kind.weight_names if any(f"{prefix}{name}_{p}" in state_dict for p in parts)]
        wanted = [f"{name}_{part}" for name in names for part in parts]
        lacking = [prefix + name for name in wanted if prefix + name not in state_dict]
        names = wanted + [scale for scale in _SCALES if prefix + scale in state_dict]
        taken.update(p + name for p in entry.prefixes() for name in names if p + name in state_dict)
        if not wanted:
            twin._parameters = {}
        errors: list[str] = []
        if not lacking:
            found = {name: state_dict[prefix + name] for name in names}
            twin._load_from_state_dict(found, "", {}, True, lacking, [], errors)
            lacking = [prefix + name for name in lacking]
        missing.extend(lacking)
        wrong.extend(prefix + error for error in errors)
    if missing or wrong:
        raise StateDictMismatch(missing, [], wrong)
    return taken


def _parts(spec: LinearSpec) -> list[str]:
    """What the codes of a weight consist of in a state dict."""
    return [] if spec.weights is None else stored_parts(spec.weights)


def _float_keys(
    model: nn.Module,
    entries: list[MapEntry],
    owners: Mapping[int, nn.Module],
    state_dict: Mapping[str, Tensor],
    loaded: set[str],
) -> list[str]:
    """The keys that torch's own loading takes, checked: none missing, none left over, shapes alike."""
    expected = model.state_dict(keep_vars=True)
    quantized = {prefix + name for entry in entries for prefix in entry.prefixes() for name in _replaced(entry)}
    for entry in entries:
        if id(entry.module) in owners or _codes_of(entry, state_dict) is not None:
            quantized.update(p + name for p in entry.prefixes() for name in entry.kind.weight_names)
    floats = [key for key in expected if key in state_dict and key not in loaded and key not in quantized]
    held = {id(expected[key]) for key in floats}
    missing = [k for k in expected if k not in state_dict and k not in quantized and id(expected[k]) not in held]
    unexpected = [key for key in state_dict if key not in loaded and (key not in expected or key in quantized)]
    wrong = [
        f"{key} is {tuple(state_dict[key].shape)}, the model's is {tuple(expected[key].shape)}"
        for key in floats
        if isinstance(expected[key], Tensor) and state_dict[key].shape != expected[key].shape
    ]
    if missing or unexpected or wrong:
        raise StateDictMismatch(missing, unexpected, wrong)
    return floats


def _replaced(entry: MapEntry) -> list[str]:
    """Names in a module's state dict that are not torch's own."""
    return [f"{name}_{part}" for name in entry.kind.weight_names for part in STORED] + list(_SCALES)


def _commit(entries: list[MapEntry], twins: Mapping[int, QModule], owners: Mapping[int, nn.Module]) -> None:
    uncalibrated: list[str] = []
    for entry in entries:
        module, twin = entry.module, twins[id(entry.module)]
        module.__class__ = entry.kind
        assert isinstance(module, QModule)
        module.adopt(entry.spec, entry.calibratable)
        for name in twin._forms:
            module._parameters.pop(name, None)
        module._forms = twin._forms
        module._buffers.update(twin._buffers)
        module._non_persistent_buffers_set.update(twin._non_persistent_buffers_set)
        static = entry.spec.activations is not None and entry.spec.activations.granularity.kind == "tensor"
        if static and entry.calibratable and module.input_scale is None:
            uncalibrated.append(entry.paths[0] or "(root)")
            module._uncalibrated = uncalibrated
    for entry in entries:
        owner = owners.get(id(entry.module))
        if owner is not None:
            assert isinstance(entry.module, QModule)
            assert isinstance(owner, QModule)
            entry.module.follow(owner)
