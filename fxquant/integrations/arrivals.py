"""Weights on their way into a model on meta, whichever library reads them: float ones become codes, codes go in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from fxquant.errors import StateDictMismatch
from fxquant.integrations.freed_memory import FreedMemory
from fxquant.model.freezing import check_module_finite, freeze_modules
from fxquant.nn import QModule
from fxquant.nn.forms import stored_parts
from fxquant.spec import TensorSpec

_LOG = logging.getLogger("fxquant")


def awaits_codes(module: nn.Module, name: str) -> bool:
    """Whether `name` is a float weight of a quantized module, to be codes once it is frozen."""
    is_weight = isinstance(module, QModule) and name in module.weight_names and bool(module._weight_spec)
    return is_weight and not module.is_frozen


def freeze_if_all_came(path: str, module: QModule, freed: FreedMemory) -> None:
    """Freeze a module none of whose weights is on meta still. Raises `NonFiniteWeight`, as `fxquant.freeze` does."""
    weights = [module._parameters.get(name) for name in module.weight_names]
    if not any(weight is not None and weight.is_meta for weight in weights):
        check_module_finite(module, path)
        module.freeze()
        freed.add(sum(weight.nbytes for weight in weights if weight is not None))


def take_codes(path: str, module: QModule, name: str, parts: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Make these stored parts the frozen weight `name`, on `device`; what is wrong with them, in words."""
    _come_to(module, device)
    wanted = stored_parts(TensorSpec.parse(module._weight_spec))
    errors = [f"{path}.{name}_{part} is missing" for part in wanted if part not in parts]
    if not errors:
        module._load_codes(name, parts, f"{path}.", errors)
    return errors


def _come_to(module: QModule, device: torch.device) -> None:
    """Weights on meta come to the device, and take no memory there: codes will be held where they are."""
    for name in module.weight_names:
        weight = module._parameters.get(name)
        if weight is not None and weight.is_meta:
            empty = torch.empty((), dtype=weight.dtype, device=device).expand(weight.shape)
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def check_all_came(model: nn.Module, awaited: Set[str], wrong: list[str]) -> None:
    """Raises `StateDictMismatch` if modules of these paths have no codes, or with what was wrong with codes."""
    missing = [
        f"{path}.{name}_codes"
        for path, module in model.named_modules()
        if isinstance(module, QModule) and path in awaited
        for name in module.weight_names
        if module._weight_spec and module._parameters.get(name) is not None
    ]
    if missing or wrong:
        raise StateDictMismatch(missing, [], wrong)


def freeze_rest(model: nn.Module) -> None:
    """Tied weights, those that the checkpoint did not have, and experts of which some parameter came another way."""
    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, QModule) and not m.is_frozen]
    away = [path for path, module in modules if any(p.is_meta for p in module.parameters(recurse=False))]
    freeze_modules(model, [module for path, module in modules if path not in away])
    if away:
        _LOG.warning("offloaded, and so rounded at each call instead of stored as codes: %s", ", ".join(away))
