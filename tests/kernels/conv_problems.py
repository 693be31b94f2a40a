"""Convolutions for the kernels' tests: shapes, weights in every form, and the layouts that x may have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.ops import reference


@dataclass(frozen=True)
class Shape:
    """x [batch, channels, *space], a weight [out, channels, *kernel], and how it moves."""

    batch: int
    channels: int
    out: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def features(self) -> int:
        return self.channels * math.prod(self.kernel)

    @property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        return self.stride, self.padding, self.dilation

    def __str__(self) -> str:
        return "-".join("x".join(map(str, part)) for part in (self.space, self.kernel, *self.moves)) + f"-o{self.out}"


SHAPES = (
    Shape(1, 1, 1, (1,), (1,), (1,), (0,), (1,)),
    Shape(2, 3, 5, (17,), (3,), (1,), (1,), (1,)),
    Shape(2, 3, 70, (40,), (5,), (2,), (2,), (2,)),
    Shape(1, 8, 64, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    Shape(2, 5, 65, (13, 17), (3, 2), (2, 3), (1, 0), (2, 1)),
    Shape(3, 16, 33, (14, 14), (1, 1), (1, 1), (0, 0), (1, 1)),
    Shape(3, 16, 33, (14, 15), (1, 1), (2, 2), (0, 0), (1, 1)),
    Shape(1, 3, 20, (40, 41), (7, 7), (2, 2), (3, 3), (1, 1)),
    Shape(2, 20, 130, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    Shape(2, 3, 8, (5, 6, 7), (3, 3, 3), (1, 2, 1), (1, 1, 0), (1, 1, 2)),
    Shape(2, 4, 9, (3, 5, 6), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    Shape(1, 2, 3, (4, 4), (4, 4), (1, 1), (0, 0), (1, 1)),  # one patch
    Shape(1, 2, 3, (3, 3), (2, 2), (5, 5), (4, 4), (3, 3)),  # patches of padding alone
    Shape(1, 2, 3, (6, 300), (1, 2), (1, 70), (0, 0), (1, 1)),  # a stride beyond 64
    Shape(0, 2, 3, (3, 3), (2, 2), (1, 1), (0, 0), (1, 1)),
)


class ConvProblem:
    """One convolution: x, a float weight flattened, its bias."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(shape.features + 7 * shape.out)
        self.shape = shape
        self.x = torch.randn(shape.batch, shape.channels, *shape.space, generator=generator).to(dtype)
        self.weight = torch.randn(shape.out, shape.features, generator=generator)
        self.bias = torch.randn(shape.out, generator=generator).to(dtype)

    def int8(self, bias: Tensor | None) -> tuple[Any, ...]:
        codes, scale, _, _ = reference.quantize_weight(self.weight, "int8/channel")
        return reference.int8_pack(codes), scale, bias, self.shape.kernel, *self.shape.moves

    def coded(self, spec: str, bias: Tensor | None) -> tuple[Any, ...]:
        shape = self.shape
        codes, scale, zero_point, tensor_scale = reference.quantize_weight(self.weight, spec)

        def granules(t: Tensor) -> Tensor | None:
            return reference.pack_granules(t, spec, shape.out, shape.features) if t.numel() else None

        packed = reference.pack_panels(codes, spec)
        whole = tensor_scale if tensor_scale.numel() else None
        tail = (bias, shape.out, shape.kernel, *shape.moves, spec)
        return packed, granules(scale), granules(zero_point), whole, *tail

    def decoded(self, spec: str) -> Tensor:
        codes, scale, zero_point, whole = reference.quantize_weight(self.weight, spec)
        return reference.dequantize(codes, scale, zero_point, spec, torch.float32, whole if whole.numel() else None)

    def float64(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = self.shape
        weight = weight.view(shape.out, shape.channels, *shape.kernel)
        zeros = [0] * len(shape.kernel)
        return torch.ops.aten.convolution.default(x, weight, None, *shape.moves, False, zeros, 1)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """x in each way that it may lie in memory."""
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
        yield torch.cat([x, x[:, :1]], 1).contiguous(memory_format=torch.channels_last)[:, :-1]
    if x.dim() == 5:
        yield x.contiguous(memory_format=torch.channels_last_3d)
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield wide[..., ::2]
