"""embedding_dequantize, embedding_packed: look up rows of a quantized table and decode only these.

Bit-equal to embedding(indices, dequantize(table)). The table is a constant: a gradient to it is refused, by name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import GradientsNeedTraining, ShapeMismatch
from fxquant.ops.checks import check_devices, check_packed
from fxquant.ops.library import declare
from fxquant.ops.panels import check_coded, check_output
from fxquant.ops.storage import check_table
from fxquant.spec import CHANNEL, INT8, TensorSpec

_OP = "fxquant.embedding_dequantize"
_PACKED = "fxquant.embedding_packed"
_INT8 = TensorSpec(INT8, CHANNEL)


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
    codes = numerics.unpack_codes_rows(rows, parsed, embedding_dim)
    table = numerics.decode(codes, scale, zero_point, parsed, dtype, tensor_scale)
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
    _check_indices(_OP, indices)
    return check_table(_OP, rows, scale, zero_point, tensor_scale, embedding_dim, spec, dtype)


def embedding_packed(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `indices` of a table that stands in the layout of the linear kernels, as one that is a linear's weight too.

    indices int32 or int64 of any shape, 0 <= index < num_embeddings (else IndexError). packed: for int8/channel what
    int8_pack makes, with scale float32 [N, 1] or [N]; for any other spec packed, scale, zero_point and tensor_scale are
    as in decode_weight. Returns [*indices, embedding_dim] in `dtype`.
    """
    parsed = _check_packed(indices, packed, scale, zero_point, tensor_scale, num_embeddings, embedding_dim, spec, dtype)
    rows = indices.reshape(-1).long()
    if bool(((rows < 0) | (rows >= num_embeddings)).any()):
        raise IndexError(f"{_PACKED}: an index is out of range for a table of {num_embeddings} rows")
    sizes = (num_embeddings, embedding_dim)
    if parsed == _INT8:
        codes = numerics.gather_int8(packed, rows, *sizes)
        values = numerics.decode(codes, scale.reshape(-1, 1)[rows], None, parsed, dtype)
        return values.view(*indices.shape, embedding_dim)
    zeros = None
    if parsed.has_zero_point and zero_point is not None:
        zeros = numerics.gather_granules(zero_point, rows, parsed, *sizes)
    if tensor_scale is not None and tensor_scale.shape[0] != 1:
        tensor_scale = tensor_scale[rows]
    values = numerics.decode(
        numerics.gather_panels(packed, rows, *sizes, parsed),
        numerics.gather_granules(scale, rows, parsed, *sizes),
        zeros,
        numerics.rows_spec(parsed),
        dtype,
        tensor_scale,
    )
    return values.view(*indices.shape, embedding_dim)


def _embedding_packed_fake(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    _check_packed(indices, packed, scale, zero_point, tensor_scale, num_embeddings, embedding_dim, spec, dtype)
    return packed.new_empty([*indices.shape, embedding_dim], dtype=dtype)


def _check_packed(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    text: str,
    dtype: torch.dtype,
) -> TensorSpec:
    check_devices(_PACKED, indices=indices, packed=packed, scale=scale)
    _check_indices(_PACKED, indices)
    check_output(_PACKED, dtype)
    spec = TensorSpec.parse(text)
    if spec != _INT8:
        return check_coded(_PACKED, packed, scale, zero_point, tensor_scale, num_embeddings, embedding_dim, text)
    check_packed(_PACKED, packed, num_embeddings, embedding_dim)
    if scale.dtype != torch.float32 or list(scale.shape) not in ([num_embeddings, 1], [num_embeddings]):
        met = f"scale of shape {list(scale.shape)} and dtype {scale.dtype}"
        raise ShapeMismatch(_PACKED, met, f"float32 of shape [{num_embeddings}, 1] or [{num_embeddings}]")
    return spec


def _check_indices(op: str, indices: Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise ShapeMismatch(op, f"indices of dtype {indices.dtype}", "torch.int32 or torch.int64")


def _refuse(op: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise GradientsNeedTraining(op)

    return backward


declare(
    "embedding_dequantize(Tensor indices, Tensor rows, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "int embedding_dim, str spec, ScalarType dtype) -> Tensor",
    reference=embedding_dequantize,
    fake=_embedding_dequantize_fake,
    backward=_refuse(_OP),
)
declare(
    "embedding_packed(Tensor indices, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "int num_embeddings, int embedding_dim, str spec, ScalarType dtype) -> Tensor",
    reference=embedding_packed,
    fake=_embedding_packed_fake,
    backward=_refuse(_PACKED),
)
