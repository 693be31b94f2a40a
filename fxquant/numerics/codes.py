"""Codes, scale and zero point of one tensor; decoding, which is the same for every format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.numerics.granules import combine
from fxquant.spec import TensorSpec


class Codes(NamedTuple):
    """A quantized tensor.

    codes       one code an element, in the shape of the tensor; int8, uint8 (affine) or a float8 dtype.
    scale       float32, in the shape that the granularity gives.
    zero_point  uint8 in the shape of `scale` if affine, else empty (shape [0]).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """(codes - zero_point) * scale, computed in float32, then rounded once to `dtype`; contiguous."""
    values = codes.float()
    if spec.scheme == "affine" and zero_point is not None:
        values = combine(torch.sub, values, zero_point.float(), spec.granularity)
    return combine(torch.mul, values, scale, spec.granularity).to(dtype).contiguous()


def no_zero_point(scale: Tensor) -> Tensor:
    """The empty zero point of a symmetric scheme."""
    return torch.empty(0, dtype=torch.uint8, device=scale.device)
