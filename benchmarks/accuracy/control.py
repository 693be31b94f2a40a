"""Plain round-to-nearest on the weights of a copy of the model, in float: what a scheme costs, without fxquant.

Written apart from fxquant on purpose: where both give the same figure, fxquant does what the scheme says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Quantizer = Callable[[Tensor], Tensor]
"""A matrix of rows [output, inputs] to the values that its codes stand for."""


def _grouped(weight: Tensor, size: int | None) -> Tensor:
    """[rows, groups, size]; a last group that is not full repeats its row's last value, which alters no range."""
    if size is None:
        return weight.unsqueeze(1)
    missing = -weight.shape[1] % size
    return torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, size))


def _ungrouped(groups: Tensor, columns: int) -> Tensor:
    return groups.flatten(1)[:, :columns]


def symmetric(bits: int, group: int | None = None) -> Quantizer:
    """Codes of plus and minus 2^(bits-1) - 1."""
    largest = 2 ** (bits - 1) - 1

    def quantize(weight: Tensor) -> Tensor:
        groups = _grouped(weight, group)
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest
        return _ungrouped((groups / scale).round() * scale, weight.shape[1])

    return quantize


def affine(bits: int, group: int) -> Quantizer:
    """Codes 0 to 2^bits - 1 over a range that holds 0, with an integer zero point."""
    largest = 2**bits - 1

    def quantize(weight: Tensor) -> Tensor:
        groups = _grouped(weight, group)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low).clamp(min=1e-30) / largest
        zero = (-low / scale).round()
        codes = ((groups / scale).round() + zero).clamp(0, largest)
        return _ungrouped((codes - zero) * scale, weight.shape[1])

    return quantize


def float8(weight: Tensor) -> Tensor:
    """float8 e4m3, one scale for each row."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


@torch.no_grad()
def rounded(model: nn.Module, quantize: Quantizer, exclude: str | None = None) -> nn.Module:
    """A copy of the model whose linears and convolutions have rounded weights; the rest is as it was, and `exclude`."""
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        left = exclude is not None and fnmatchcase(name, exclude)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not left:
            weight = module.weight
            weight.copy_(quantize(weight.flatten(1)).view_as(weight))
    return twin
