"""Float models to be filled: made without memory for their weights, and brought to other dtypes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxquant.errors import NotAModule
from fxquant.nn import QModule

_PATCHING = threading.Lock()


class Buffer(NamedTuple):
    """A buffer that no state dict holds, and the module that has it."""

    module: nn.Module
    name: str
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        self.module._buffers[self.name] = tensor


def made_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """What the factory makes when tensors are made on the meta device."""
    with torch.device("meta"):
        return _checked(factory())


def made_with_buffers(factory: Callable[[], nn.Module]) -> nn.Module:
    """The same with real buffers: parameters go to meta one by one, as modules register them."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        parameter = param
        if parameter is not None and not parameter.is_meta:
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            vars(empty).update(vars(parameter))
            parameter = empty
        register(self, name, parameter)

    with _PATCHING:
        nn.Module.register_parameter = registered
        try:
            return _checked(factory())
        finally:
            nn.Module.register_parameter = register


def cast(
    model: nn.Module, tensors: Mapping[str, Tensor], computing: Mapping[str, torch.dtype], dtype: torch.dtype | None
) -> Callable[[], None]:
    """Give floating parameters and buffers of the state dict the dtype that they will have; what undoes it.

    That is `dtype`, or if it is None what the tensors have, and what quantized modules compute in, by path.
    """
    before: list[tuple[Any, Tensor]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        persistent = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, held in (*module._parameters.items(), *persistent.items()):
            if held is None or not held.is_floating_point() or name in ("input_scale", "output_scale"):
                continue
            stored = tensors.get(prefix + name)
            own = computing.get(path) if stored is None else stored.dtype
            wanted = dtype or own
            if wanted is not None and wanted.is_floating_point and wanted.itemsize > 1 and wanted is not held.dtype:
                before.append((held, held.data))
                held.data = held.data.to(wanted)
        if isinstance(module, QModule) and "compute_like" in module._buffers:
            probe = module._buffers["compute_like"]
            wanted = dtype or computing.get(path)
            if probe is not None and wanted is not None:
                before.append((probe, probe.data))
                probe.data = probe.data.to(wanted)

    def undo() -> None:
        for held, data in reversed(before):
            held.data = data

    return undo


def non_persistent(model: nn.Module) -> Iterator[tuple[str, Buffer]]:
    """The floating buffers that no state dict holds, by path."""
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            tensor = module._buffers.get(name)
            if tensor is not None and tensor.is_floating_point():
                yield (f"{path}.{name}" if path else name), Buffer(module, name, tensor)


def _checked(made: object) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise NotAModule(made)
    return made
