"""Codes from values, whatever the format.

code = rint(x * factor) with half to even, or the nearest float on the format's grid; factor = steps / range rounded
once in float32. A granule without usable range has codes 0 (a float keeps its sign: -0) and scale 0 or, if it holds NaN
or infinity, NaN. Where the group does not divide K, the last group of a row is shorter: ceil(K / group) scales a row,
and codes are never padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.codes import Codes
from fxquant.numerics.granules import as_matrix, in_place, per_row, row_blocks, rows_of
from fxquant.numerics.held import float8_bytes, held_dtype, is_held_as_bytes
from fxquant.numerics.scales import Scales
from fxquant.numerics.small_floats import small_float_bits
from fxquant.spec import TensorSpec


def encode(x: Tensor, scales: Scales, spec: TensorSpec) -> Codes:
    """Codes of x under given scales: each value's nearest code, saturating."""
    return Codes(nearest_codes(x, scales, spec), scales.scale, scales.zero_point, scales.tensor_scale)


def nearest_codes(x: Tensor, scales: Scales, spec: TensorSpec) -> Tensor:
    """The codes alone: contiguous, in the shape of x, in the spec's code dtype, as the device holds it."""
    x = x.detach()
    codes = torch.empty(x.shape, dtype=held_dtype(spec.code_dtype, x.device), device=x.device)
    if x.numel() == 0:
        return codes
    matrix = as_matrix(x, spec.granularity)
    target = codes.view(matrix.shape)
    factor = per_row(scales.factor, x.shape, spec.granularity)
    offset = None if scales.offset is None else per_row(scales.offset, x.shape, spec.granularity)
    for rows in row_blocks(matrix):
        values = matrix[rows].to(torch.float32, copy=True)
        zero = None if offset is None else rows_of(offset, rows)
        target[rows] = _rounded(values, rows_of(factor, rows), zero, spec)
    return codes


def _rounded(values: Tensor, factor: Tensor, offset: Tensor | None, spec: TensorSpec) -> Tensor:
    """The codes of some rows, whose memory is written to; of a dtype that converts to the code dtype exactly."""
    if offset is not None and spec.scheme == "shift":
        in_place(Tensor.sub_, values, offset, spec.granularity)
    in_place(Tensor.mul_, values, factor, spec.granularity)
    values.nan_to_num_(nan=0.0)  # only NaN * 0 and infinity * 0 can be NaN here
    if spec.format.kind == "float":
        values.clamp_(spec.qmin, spec.qmax)
        if is_held_as_bytes(spec.code_dtype, values.device):
            return float8_bytes(values, spec.format)
        return small_float_bits(values, spec.format) if spec.format.is_small_float else values
    values.round_()
    if offset is not None and spec.scheme == "affine":
        in_place(Tensor.add_, values, offset, spec.granularity)
    return values.clamp_(spec.qmin, spec.qmax)
