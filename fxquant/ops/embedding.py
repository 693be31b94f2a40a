"""embedding_dequantize: looks up rows of a quantized table and decodes only these.

Bit-equal to embedding(indices, dequantize(table)). The table is a constant: a gradient to it is refused, by name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fxquant.errors import GradientsNeedTraining, ShapeMismatch
from fxquant.numerics import decode, unpack_codes_rows
from fxquant.ops.checks import check_devices
from fxquant.ops.library import declare
from fxquant.ops.storage import check_table
from fxquant.spec import TensorSpec

_OP = "fxquant.embedding_dequantize"


def embedding_dequantize(
    indices: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    embedding_dim: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `indices` of the table whose codes [N, embedding_dim] `rows` holds, decoded.

    indices int32 or int64 of any shape, 0 <= index < N (else IndexError, as torch's own embedding); rows uint8
    [N, ceil(embedding_dim * bits / 8)] of pack_codes_rows; scale, zero_point and tensor_scale as quantize_weight makes
    them of the table. Returns [*indices, embedding_dim] in `dtype`.
    """
    parsed = _check(indices, rows, scale, zero_point, tensor_scale, embedding_dim, spec, dtype)
    table = decode(unpack_codes_rows(rows, parsed, embedding_dim), scale, zero_point, parsed, dtype, tensor_scale)
    return torch.nn.functional.embedding(indices, table)


def _embedding_dequantize_fake(
    indices: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    embedding_dim: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    _check(indices, rows, scale, zero_point, tensor_scale, embedding_dim, spec, dtype)
    return rows.new_empty([*indices.shape, embedding_dim], dtype=dtype)


def _check(
    indices: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    embedding_dim: int,
    spec: str,
    dtype: torch.dtype,
) -> TensorSpec:
    check_devices(_OP, indices=indices, rows=rows)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ShapeMismatch(_OP, f"indices of dtype {indices.dtype}", "torch.int32 or torch.int64")
    return check_table(_OP, rows, scale, zero_point, tensor_scale, embedding_dim, spec, dtype)


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise GradientsNeedTraining(_OP)


declare(
    "embedding_dequantize(Tensor indices, Tensor rows, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "int embedding_dim, str spec, ScalarType dtype) -> Tensor",
    reference=embedding_dequantize,
    fake=_embedding_dequantize_fake,
    backward=_refuse,
)
