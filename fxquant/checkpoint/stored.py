"""What a model's state dict will hold, known before any of it is made, and then made module by module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxquant.checkpoint.tensor_writer import NAMES
from fxquant.errors import NotStorable
from fxquant.model.meta import hollow
from fxquant.nn import QModule
from fxquant.nn.forms import stored_codes, stored_numbers


@dataclass(frozen=True)
class Stored:
    """The plan of a state dict.

    tensors  by key, in the state dict's order, shapes and dtypes: tensors on meta (or real ones). Shared ones once.
    shared   keys that are left out: the key of the same tensor.
    """

    tensors: dict[str, Tensor]
    shared: dict[str, str]


class Piece(NamedTuple):
    """Bytes of a stored tensor, from an offset on: those of `tensor`, a whole one or some of its rows."""

    key: str
    tensor: Tensor
    offset: int


def plan(model: nn.Module) -> Stored:
    """The plan of a model's state dict. Takes no memory for tensors, unless a module has a state dict of its own way.

    Raises:
        NotStorable: a tensor is on meta, is no plain tensor, or has a dtype that safetensors do not know; or the state
            dict holds what is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    entries = model.state_dict(keep_vars=True) if has_own_way(model) else hollow(model).state_dict(keep_vars=True)
    held = _held(model)
    for key, tensor in entries.items():
        source = held.get(key)
        _check(key, tensor, source)
        identity = key if source is None else _identity(source)
        if (other := first.setdefault(identity, key)) != key:
            shared[key] = other
        else:
            tensors[key] = tensor
    return Stored(tensors, shared)


def pieces_of(model: nn.Module, stored: Stored) -> Iterator[Piece]:
    """The tensors of a plan with their values, module by module; large codes in pieces, as they are packed."""
    if has_own_way(model):
        yield from (Piece(key, tensor, 0) for key, tensor in model.state_dict().items() if key in stored.tensors)
        return
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own: dict[str, Tensor] = {}
        if isinstance(module, QModule) and type(module)._save_to_state_dict is QModule._save_to_state_dict:
            super(QModule, module)._save_to_state_dict(own, prefix, False)
            for name, form in module._forms.items():
                parts, offset = module.parts(name), 0
                for rows in stored_codes(parts, form):
                    yield Piece(f"{prefix}{name}_codes", rows, offset)
                    offset += rows.nbytes
                own |= {f"{prefix}{name}_{part}": tensor for part, tensor in stored_numbers(parts, form).items()}
        else:
            module._save_to_state_dict(own, prefix, False)
        yield from (Piece(key, tensor, 0) for key, tensor in own.items() if key in stored.tensors)


def has_own_way(model: nn.Module) -> bool:
    """Whether some module changes what torch's `state_dict` gives, by hooks or a method of its own."""
    return any(
        module._state_dict_hooks or module._state_dict_pre_hooks or type(module).state_dict is not nn.Module.state_dict
        for module in model.modules()
    )


def _held(model: nn.Module) -> dict[str, Any]:
    """By key: the tensor that the model holds, or what makes it: a quantized module, and the name of its part."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = {**module._parameters, **module._buffers}
        found.update({prefix + name: tensor for name, tensor in own.items() if tensor is not None})
        if isinstance(module, QModule):
            made: dict[str, Tensor] = {}
            hollow(module)._save_to_state_dict(made, "", True)
            found.update({prefix + name: (module, name) for name in made if name not in own})
    return found


def _identity(source: Any) -> Any:
    if isinstance(source, tuple):
        return id(source[0]), source[1]
    if not source.numel():
        return id(source)
    return source.device, source.data_ptr(), source.dtype, tuple(source.shape), source.stride()


def _check(key: str, tensor: Any, source: Any) -> None:
    real = source if isinstance(source, Tensor) else tensor
    if not isinstance(tensor, Tensor):
        raise NotStorable(key, f"it is {type(tensor).__name__!r}, no tensor")
    if isinstance(source, Tensor) and source.is_meta:
        raise NotStorable(key, "it is on the meta device, and has no values")
    if real.layout != torch.strided or type(real) not in (Tensor, nn.Parameter, nn.Buffer):
        raise NotStorable(key, f"it is {type(real).__name__} of layout {real.layout}, no plain tensor")
    if tensor.dtype not in NAMES:
        raise NotStorable(key, f"safetensors have no {tensor.dtype}")
