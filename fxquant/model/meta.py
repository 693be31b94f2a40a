"""Models on the meta device: what a state dict does not hold is computed anew, or said to be missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxquant.errors import BuffersOnMeta


class Home(NamedTuple):
    """Where a tensor is kept: in the buffers of a module, or as an ordinary attribute of it."""

    module: nn.Module
    name: str

    def put(self, tensor: Tensor) -> None:
        held: dict[str, Any] = self.module._buffers if self.name in self.module._buffers else self.module.__dict__
        held[self.name] = tensor


def restored_buffers(model: nn.Module) -> list[tuple[Home, Tensor]]:
    """Values for the tensors on meta that no state dict holds: non-persistent buffers and plain attributes.

    The model's own `_init_weights(module)` computes them, as transformers' from_pretrained asks it to; it runs on a
    hollow copy of the module that has them, twice, over zeros and over ones, so that what it leaves as it was is found
    out. The model is not changed.

    Raises:
        BuffersOnMeta: names those that it does not compute, or that have no such model above them.
    """
    found: list[tuple[Home, Tensor]] = []
    lost: list[str] = []
    for path, module, initializer in _with_initializers(model):
        names = list(_homeless(module))
        if not names:
            continue
        first, second = ({}, {}) if initializer is None else (_run(initializer, module, names, fill) for fill in (0, 1))
        for name in names:
            if name in first and torch.equal(first[name], second[name]):
                found.append((Home(module, name), first[name]))
            else:
                lost.append(f"{path}.{name}" if path else name)
    if lost:
        raise BuffersOnMeta(lost)
    return found


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Put empty tensors on `device` in the place of parameters and buffers on meta; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                vars(empty).update(vars(parameter))
                made[id(parameter)] = empty
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def _homeless(module: nn.Module) -> Iterator[str]:
    """Names of the module's tensors on meta that its state dict leaves out."""
    for name in module._non_persistent_buffers_set:
        if (buffer := module._buffers.get(name)) is not None and buffer.is_meta:
            yield name
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor) and value.is_meta:
            yield name


def _with_initializers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Each module, its path, and the nearest module at or above it that knows how to initialize modules."""
    nearest: dict[str, nn.Module | None] = {}
    for path, module in model.named_modules():
        own = module if callable(getattr(module, "_init_weights", None)) else None
        above = nearest.get(path.rpartition(".")[0]) if path else None
        nearest[path] = own or above
        yield path, module, nearest[path]


def _run(initializer: nn.Module, module: nn.Module, names: list[str], fill: int) -> dict[str, Tensor]:
    """The named tensors of a hollow copy after initialization, which found them filled with `fill`."""
    copy = hollow(module)
    # On the CPU whatever the user's default device is: it may be the very meta that the model was made on.
    with torch.no_grad(), torch.device("cpu"):
        for name in names:
            held: Any = module._buffers.get(name, module.__dict__.get(name))
            Home(copy, name).put(torch.full(held.shape, fill, dtype=held.dtype))
        initializer._init_weights(copy)  # type: ignore[operator]
    return {name: copy._buffers.get(name, copy.__dict__.get(name)) for name in names}  # type: ignore[misc]


def hollow(module: nn.Module) -> nn.Module:
    """A copy of the module and all below it, with its tensors on meta: what is written to it is not in the model."""
    copy = object.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    copy._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for name, p in module._parameters.items()
    }
    copy._buffers = {name: None if b is None else b.to("meta") for name, b in module._buffers.items()}
    copy._modules = {name: None if m is None else hollow(m) for name, m in module._modules.items()}
    return copy
