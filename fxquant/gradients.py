"""Inference in grad mode: a forgotten no_grad is served, a real request for a gradient is refused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxquant.errors import ForgottenNoGradWarning, GradientsNeedTraining


def refuse_gradients(activations: Sequence[tuple[str, Tensor]]) -> None:
    """Check that nobody asks for a gradient through a quantized graph; `activations` are named for messages.

    In grad mode whatever is computed from a parameter requires grad. If only parameters would receive the gradient, the user
    forgot ``no_grad``: the result is computed without gradients, with a warning.

    Raises:
        GradientsNeedTraining: a tensor that is no parameter would receive a gradient.
    """
    if not torch.is_grad_enabled():
        return
    for name, value in activations:
        if value.requires_grad:
            if not _reaches_parameters_only(value):
                raise GradientsNeedTraining(name)
            warn_of_grad_mode(name)


def warn_of_grad_mode(where: str) -> None:
    """Say that the result will carry no gradient though grad mode is on."""
    warnings.warn(ForgottenNoGradWarning(where), stacklevel=3)


def _reaches_parameters_only(value: Tensor) -> bool:
    if value.grad_fn is None:
        return isinstance(value, nn.Parameter)
    todo, seen = [value.grad_fn], set()
    while todo:
        function = todo.pop()
        leaf = getattr(function, "variable", None)
        if leaf is not None and not isinstance(leaf, nn.Parameter):
            return False
        following = [f for f, _ in function.next_functions if f is not None and f not in seen]
        seen.update(following)
        todo += following
    return True
