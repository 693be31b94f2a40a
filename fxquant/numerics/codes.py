"""Codes, scales and zero points of one tensor; decoding, which is the same for every format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.numerics.granules import as_matrix, in_place, per_row, row_blocks, rows_of
from fxquant.numerics.held import byte_values, scale_values
from fxquant.numerics.small_floats import code_values
from fxquant.spec import TENSOR, TensorSpec


class Codes(NamedTuple):
    """A quantized tensor.

    codes         one code an element, in the shape of the tensor; int8, uint8 (with a zero point, and the bit patterns
                  of small floats) or a float8 dtype.
    scale         in the shape that the granularity gives and the dtype that the spec says.
    zero_point    in the shape of `scale`: uint8 if affine, the value of code 0 in the scale's dtype if shift; else
                  empty (uint8 [0]).
    tensor_scale  float32 [1] * ndim if the spec has one, else empty (float32 [0]).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    tensor_scale: Tensor


def decode(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: TensorSpec,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """The values that codes stand for, in `dtype`; contiguous, in the shape of codes.

    (value(code) - zero_point) * scale * tensor_scale, or value(code) * scale + shift: float32, in that order, rounded
    once to `dtype`. scale of a whole tensor, and tensor_scale: [1] * ndim, or [N, 1, ...] for tensors that were joined
    along axis 0. float8 numbers may also be given as their bytes (see `fxquant.numerics.held`).
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel() == 0:
        return out
    granularity, shape = spec.granularity, codes.shape
    matrix = as_matrix(codes, granularity)
    target = out.view(matrix.shape)
    scales = per_row(scale_values(scale, spec.scale_dtype), shape, granularity)
    zeros = per_row(zero_point, shape, granularity) if spec.has_zero_point and zero_point is not None else None
    whole = per_row(tensor_scale, shape, TENSOR) if spec.has_tensor_scale and tensor_scale is not None else None
    table = None
    if spec.format.is_small_float:
        table = code_values(spec.format, codes.device)
    elif spec.format.kind == "float" and codes.dtype == torch.uint8:
        table = byte_values(spec.format.storage, codes.device)
    for rows in row_blocks(matrix):
        values = matrix[rows].to(torch.float32) if table is None else table[matrix[rows].int()]
        if zeros is not None and spec.scheme == "affine":
            in_place(Tensor.sub_, values, rows_of(zeros, rows), granularity)
        in_place(Tensor.mul_, values, rows_of(scales, rows), granularity)
        if whole is not None:
            values.mul_(rows_of(whole, rows))
        if zeros is not None and spec.scheme == "shift":
            in_place(Tensor.add_, values, rows_of(zeros, rows), granularity)
        target[rows] = values
    return out


def no_zero_point(scale: Tensor) -> Tensor:
    """The empty zero point of a symmetric scheme."""
    return torch.empty(0, dtype=torch.uint8, device=scale.device)


def no_tensor_scale(scale: Tensor) -> Tensor:
    """The empty scale of a tensor whose spec has none for the whole of it."""
    return torch.empty(0, dtype=torch.float32, device=scale.device)
