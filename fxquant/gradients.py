"""Inference in grad mode: a forgotten no_grad is served, a real request for a gradient is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fxquant.errors import ForgottenNoGradWarning, GradientsNeedTraining


class InferenceOnly:
    """Watches that nobody asks for a gradient through a quantized graph.

    In grad mode whatever is computed from a parameter requires grad. If only parameters would receive the gradient,
    the user forgot ``no_grad``: the result is computed without gradients, with one warning from each watch.
    """

    def __init__(self) -> None:
        self._warned = False

    def check(self, where: str, inputs: Iterable[Any]) -> None:
        """Look at what a graph is called with: activations, parameters, sizes. For grad mode only.

        Raises:
            GradientsNeedTraining: a tensor that is no parameter would receive a gradient.
        """
        wanting = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        if not all(_reaches_parameters_only(value) for value in wanting):
            raise GradientsNeedTraining(where)
        if wanting and not self._warned:
            self._warned = True
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
