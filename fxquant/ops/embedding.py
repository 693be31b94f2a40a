"""embedding_dequantize: looks up rows of a quantized table and decodes only these.

Bit-equal to embedding(indices, dequantize(table)). The table is a constant: a gradient to it is refused, by name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fxquant.errors import GradientsNeedTraining, ShapeMismatch
from fxquant.numerics import decode, scale_shape, unpack_codes_rows
from fxquant.ops.checks import ACTIVATION_DTYPES, check_devices
from fxquant.ops.library import declare
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
    parsed = TensorSpec.parse(spec)
    check_devices(_OP, indices=indices, rows=rows, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ShapeMismatch(_OP, f"indices of dtype {indices.dtype}", "torch.int32 or torch.int64")
    row_bytes = (embedding_dim * parsed.format.bits + 7) // 8
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_bytes:
        met = f"rows of shape {list(rows.shape)} and dtype {rows.dtype}"
        raise ShapeMismatch(_OP, met, f"uint8 [N, {row_bytes}] for {embedding_dim} codes of {parsed}")
    if dtype not in ACTIVATION_DTYPES:
        raise ShapeMismatch(_OP, f"output dtype {dtype}", "float32, bfloat16 or float16")
    _check_granules(rows.shape[0], scale, zero_point, tensor_scale, embedding_dim, parsed)
    return parsed


def _check_granules(
    count: int,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    embedding_dim: int,
    spec: TensorSpec,
) -> None:
    wanted = scale_shape((count, embedding_dim), spec.granularity)
    shapes = [wanted, [count, 1]] if spec.granularity.kind == "tensor" else [wanted]
    if scale.dtype != spec.scale_dtype or list(scale.shape) not in shapes:
        met = f"scale of shape {list(scale.shape)} and dtype {scale.dtype}"
        raise ShapeMismatch(_OP, met, f"{spec.scale_dtype} of shape {wanted} for spec {spec}")
    zero_dtype = spec.scale_dtype if spec.scheme == "shift" else torch.uint8
    if spec.has_zero_point and (
        zero_point is None or zero_point.shape != scale.shape or zero_point.dtype != zero_dtype
    ):
        met = "no zero_point" if zero_point is None else f"zero_point {list(zero_point.shape)} {zero_point.dtype}"
        raise ShapeMismatch(_OP, met, f"{zero_dtype} of shape {list(scale.shape)} for spec {spec}")
    if not spec.has_tensor_scale:
        return
    known = tensor_scale is not None and list(tensor_scale.shape) in ([1, 1], [count, 1])
    if tensor_scale is None or not known or tensor_scale.dtype != torch.float32:
        met = "no tensor_scale" if tensor_scale is None else f"tensor_scale of shape {list(tensor_scale.shape)}"
        raise ShapeMismatch(_OP, met, f"float32 of shape [1, 1] or [{count}, 1] for spec {spec}")


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise GradientsNeedTraining(_OP)


declare(
    "embedding_dequantize(Tensor indices, Tensor rows, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "int embedding_dim, str spec, ScalarType dtype) -> Tensor",
    reference=embedding_dequantize,
    fake=_embedding_dequantize_fake,
    backward=_refuse,
)
