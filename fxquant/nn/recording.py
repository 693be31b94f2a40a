"""Who listens while quantized modules run: a `Calibration` puts itself here, and every QModule asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn


class Recorder(Protocol):
    """What a module tells of itself, in this order: that it is called, its float input, its float output."""

    def record_call(self, module: nn.Module) -> None: ...

    def record_input(self, module: nn.Module, x: Tensor) -> None: ...

    def record_output(self, module: nn.Module, y: Tensor) -> None: ...


# Of the process, not of a thread. Changed in place only: modules, and Dynamo's guards, hold on to the list itself.
ACTIVE: list[Recorder] = []


def recorded(module: nn.Module, x: Tensor, compute: Callable[[Tensor, str], Tensor]) -> Tensor:
    """compute(x, ""), that is with activations left float, told to every recorder."""
    recorders = tuple(ACTIVE)
    for recorder in recorders:
        recorder.record_call(module)
        recorder.record_input(module, x)
    y = compute(x, "")
    for recorder in recorders:
        recorder.record_output(module, y)
    return y
