"""Which model a module was called for, and what a module's path in it is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import nn

from fxquant.nn.base import QModule


def outermost_module() -> nn.Module | None:
    """The module whose method, a forward as a rule, is the first one on the call stack of this thread.

    A global forward hook would tell as well; but compiled modules warn of each one.
    """
    found: nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            found = owner if isinstance(owner, nn.Module) else found
        frame = frame.f_back
    return found


def paths_in(models: Iterable[nn.Module]) -> dict[QModule, str]:
    """The path of each quantized module in its model.

    If quantized modules are in several of the models, each path begins with the class of its model. A model that stands
    in another one is a part of that one.
    """
    groups: list[tuple[str, dict[QModule, str]]] = []
    known: set[QModule] = set()
    for root in _tops(list(models)):
        fresh = {module: path for path, module in _quantized(root) if module not in known}
        if fresh:  # a compiled model and the view of it that runs hold the same modules
            known.update(fresh)
            groups.append((unused(type(root).__name__, [name for name, _ in groups]), fresh))
    if len(groups) == 1:
        return {module: path or "(root)" for module, path in groups[0][1].items()}
    return {module: f"{name}.{path}" if path else name for name, fresh in groups for module, path in fresh.items()}


def unused(name: str, taken: Iterable[str]) -> str:
    """`name`, or name#2, name#3, …, whichever is not taken."""
    names, found, number = set(taken), name, 1
    while found in names:
        number += 1
        found = f"{name}#{number}"
    return found


def _tops(models: list[nn.Module]) -> list[nn.Module]:
    below = {child for model in models for child in model.modules() if child is not model}
    return [model for model in models if model not in below]


def _quantized(root: nn.Module) -> Iterator[tuple[str, QModule]]:
    for path, module in root.named_modules():
        if isinstance(module, QModule):
            # torch.compile's wrapper, and ours, hold the model under this name.
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), module
