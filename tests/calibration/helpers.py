"""Quantized modules that are made by hand: one that computes nothing, so that ranges are exact, and real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fxquant.calibration import Calibration
from fxquant.nn import QLinear, QModule, recording
from fxquant.spec import LinearSpec

Model = TypeVar("Model", bound=nn.Module)
INT8 = "w=int8/channel x=int8/token"


class Through(QModule):
    """Its output is its input; called, it tells what real modules tell."""

    def __init__(self, spec: str = INT8, calibratable: bool = True) -> None:
        super().__init__()
        self.adopt(LinearSpec.parse(spec), calibratable)

    def forward(self, input: Tensor) -> Tensor:
        return recording.recorded(self, input, lambda x, activations: x) if recording.ACTIVE else input


def quantized(model: Model, spec: str = INT8) -> Model:
    """The model, its linears quantized, unfrozen, calibratable."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = QLinear
            assert isinstance(module, QLinear)
            module.adopt(LinearSpec.parse(spec), calibratable=True)
    return model


def filled(*values: float) -> list[Tensor]:
    """One batch for each value, which is its largest."""
    return [torch.tensor([[0.0, value / 2, -value / 4, value]]) for value in values]


def input_scale(module: nn.Module) -> Tensor:
    """The scale that a calibration has set."""
    assert isinstance(module, QModule)
    assert module.input_scale is not None
    return module.input_scale


def output_scale(module: nn.Module) -> Tensor:
    assert isinstance(module, QModule)
    assert module.output_scale is not None
    return module.output_scale


def is_uncalibrated(module: nn.Module) -> bool:
    """True if no calibration has set a scale."""
    assert isinstance(module, QModule)
    return module.input_scale is None and module.output_scale is None


def scale(largest: float, steps: float = 127) -> Tensor:
    """That of a range; 127 steps are those of int8."""
    return torch.tensor(largest, dtype=torch.float32) / steps


def run(model: nn.Module, *largest: float) -> None:
    """One call for each number, which is the largest value of its input."""
    for batch in filled(*largest):
        model(batch)


def calibrate(calibration: Calibration, data: Callable[[], object]) -> None:
    """The block, as a function: data() runs within."""
    with calibration:
        data()
