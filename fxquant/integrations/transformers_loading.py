"""What transformers' loader does with a weight: float ones become codes as they arrive, stored codes go in as they are.

The loader replaces non-persistent buffers by empty ones when all weights are there, and codes are such buffers: until
then they are marked persistent (`keep_through_loading`, `release`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming

from fxquant.errors import FxQuantError
from fxquant.integrations.arrivals import freeze_if_all_came, take_codes
from fxquant.nn import QModule
from fxquant.nn.forms import PARTS, STORED


class QuantizeOnArrival(ConversionOps):
    """Takes float weights in: a module of which all have come is frozen, and its float weights are let go."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: Any, full_layer_name: Any = None, model: Any = None, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Keys are full names, of parameters; what is not to be quantized is handed on."""
        rest: dict[str, Any] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(model, key):
                rest[key] = value
                continue
            path, _, name = key.rpartition(".")
            module: QModule = model.get_submodule(path)
            weight = module._parameters.get(name)
            if weight is None or weight.shape != tensor.shape:
                self.quantizer.left.add(key)
                rest[key] = value
                continue
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            missing_keys.discard(key)
            self._freeze_if_all_came(path, module)
        return rest

    def _freeze_if_all_came(self, path: str, module: QModule) -> None:
        try:
            freeze_if_all_came(path, module, self.quantizer.freed)
        except FxQuantError as error:
            self.quantizer.failed.append(error)  # the loader would only print it
        keep_through_loading(module)


class LoadCodes(ConversionOps):
    """Puts the stored parts of a weight into its module."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # of this name: the loader then casts nothing

    def __deepcopy__(self, memo: Any) -> LoadCodes:
        """The loader copies operations for each weight; errors go to one quantizer."""
        return self

    def convert(
        self, input_dict: Any, full_layer_name: Any = None, model: Any = None, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Keys are the names of parts, `weight_codes`, ...; the layer's name is that of the float parameter."""
        path, _, name = full_layer_name.rpartition(".")
        module: QModule = model.get_submodule(path)
        parts = {key.removeprefix(f"{name}_"): value[0] for key, value in input_dict.items()}
        missing_keys.discard(full_layer_name)
        device = next(iter(parts.values())).device
        self.hf_quantizer.failed.extend(take_codes(path, module, name, parts, device))
        keep_through_loading(module)
        return {}


def keep_through_loading(module: QModule) -> None:
    """Mark a frozen module and its codes so that the loader leaves them as they are."""
    names = [f"{name}_{part}" for name in module._forms for part in PARTS]
    module._non_persistent_buffers_set -= {name for name in names if module._buffers.get(name) is not None}
    others = (p for name, p in module._parameters.items() if name not in module.weight_names)
    if not any(p is not None and p.is_meta for p in others):
        module.__dict__["_is_hf_initialized"] = True


def release(model: nn.Module) -> bool:
    """Undo it, but for codes that are offloaded, and let codes take the layout of the device where they are now.

    Returns whether some are offloaded.
    """
    offloaded = False
    for module in model.modules():
        if isinstance(module, QModule) and module._forms:
            names = [f"{name}_{part}" for name in module._forms for part in PARTS]
            held = {name: part for name in names if (part := module._buffers.get(name)) is not None}
            here = {name for name, part in held.items() if not part.is_meta}
            module._non_persistent_buffers_set |= here
            module.settle()
            offloaded = offloaded or len(here) < len(held)
    return offloaded


def awaited_names(model: nn.Module) -> dict[str, list[str]]:
    """By name of a float parameter that some module wants as codes: the names of the parts."""
    names = {
        name
        for module in model.modules()
        if isinstance(module, QModule) and module._weight_spec
        for name in module.weight_names
        if module._parameters.get(name) is not None
    }
    return {name: [f"{name}_{part}" for part in STORED] for name in sorted(names)}


def tie(model: Any) -> set[str]:
    """Tie weights of a model on meta, which transformers only does when all are there; the names of those."""
    tied: Mapping[str, str] = model.all_tied_weights_keys
    for pair in tied.items():
        (target, source), (own, name) = zip(*(_home(model, key) for key in pair), strict=True)
        if source._parameters.get(name) is not None:
            target._parameters[own] = source._parameters[name]
    return {*tied.keys(), *tied.values()}


def _home(model: Any, key: str) -> tuple[nn.Module, str]:
    """The module of a key, and the name that its tensor has there."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def renamed_owners(renamed: Mapping[str, str]) -> list[WeightRenaming]:
    """Codes that are stored under the first module go to the second."""
    return [WeightRenaming(rf"^{re.escape(path)}\.weight_", f"{home}.weight_") for path, home in renamed.items()]
