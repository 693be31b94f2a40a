"""pack_rows, unpack_rows and decode_rows: codes as the bit streams that a checkpoint and an embedding table hold.

Rows take the bytes that the format promises. Tables are read that way, and weights too small for a kernel's layout.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fxquant.errors import GradientsNeedTraining, ShapeMismatch
from fxquant.numerics import decode, pack_codes_rows, unpack_codes_rows
from fxquant.numerics.held import held_dtype
from fxquant.ops.checks import ACTIVATION_DTYPES, check_devices
from fxquant.ops.library import declare, no_gradient
from fxquant.spec import TensorSpec

_DECODE = "fxquant.decode_rows"


def pack_rows(codes: Tensor, spec: str) -> Tensor:
    """Codes [..., K] -> uint8 [..., ceil(K * bits / 8)]: each row one little-endian bit stream (docs/formats.md)."""
    return pack_codes_rows(codes, _spec_of("fxquant.pack_rows", codes, spec))


def _pack_rows_fake(codes: Tensor, spec: str) -> Tensor:
    parsed = _spec_of("fxquant.pack_rows", codes, spec)
    return codes.new_empty([*codes.shape[:-1], _row_bytes(codes.shape[-1], parsed)], dtype=torch.uint8)


def unpack_rows(rows: Tensor, spec: str, width: int) -> Tensor:
    """The inverse of pack_rows: codes [..., width]."""
    return unpack_codes_rows(rows, _check_rows(rows, spec, width), width)


def _unpack_rows_fake(rows: Tensor, spec: str, width: int) -> Tensor:
    dtype = held_dtype(_check_rows(rows, spec, width).code_dtype, rows.device)
    return rows.new_empty([*rows.shape[:-1], width], dtype=dtype)


def decode_rows(
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    width: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """The tensor [N, width] whose codes `rows` holds, in `dtype`: what dequantize gives of unpack_rows.

    rows uint8 [N, ceil(width * bits / 8)]; scale, zero_point and tensor_scale as quantize_weight makes them.
    """
    parsed = check_table(_DECODE, rows, scale, zero_point, tensor_scale, width, spec, dtype)
    return decode(unpack_codes_rows(rows, parsed, width), scale, zero_point, parsed, dtype, tensor_scale)


def _decode_rows_fake(
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    width: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    check_table(_DECODE, rows, scale, zero_point, tensor_scale, width, spec, dtype)
    return rows.new_empty([rows.shape[0], width], dtype=dtype)


def check_table(
    op: str,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    width: int,
    text: str,
    dtype: torch.dtype,
) -> TensorSpec:
    """Rows of `width` codes and the numbers of their granules fit together and lie on one device. Returns the spec."""
    spec = TensorSpec.parse(text)
    check_devices(op, rows=rows, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != _row_bytes(width, spec):
        met = f"rows of shape {list(rows.shape)} and dtype {rows.dtype}"
        raise ShapeMismatch(op, met, f"uint8 [N, {_row_bytes(width, spec)}] for {width} codes of {spec}")
    if dtype not in ACTIVATION_DTYPES:
        raise ShapeMismatch(op, f"output dtype {dtype}", "float32, bfloat16 or float16")
    _check_granules(op, rows.shape[0], scale, zero_point, tensor_scale, width, spec)
    return spec


def _check_granules(
    op: str,
    count: int,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    width: int,
    spec: TensorSpec,
) -> None:
    wanted = spec.granularity.scale_shape((count, width))
    shapes = [wanted, [count, 1]] if spec.granularity.kind == "tensor" else [wanted]
    if scale.dtype != held_dtype(spec.scale_dtype, scale.device) or list(scale.shape) not in shapes:
        met = f"scale of shape {list(scale.shape)} and dtype {scale.dtype}"
        raise ShapeMismatch(op, met, f"{spec.scale_dtype} of shape {wanted} for spec {spec}")
    zero_dtype = spec.scale_dtype if spec.scheme == "shift" else torch.uint8
    if spec.has_zero_point and (
        zero_point is None or zero_point.shape != scale.shape or zero_point.dtype != zero_dtype
    ):
        met = "no zero_point" if zero_point is None else f"zero_point {list(zero_point.shape)} {zero_point.dtype}"
        raise ShapeMismatch(op, met, f"{zero_dtype} of shape {list(scale.shape)} for spec {spec}")
    if not spec.has_tensor_scale:
        return
    known = tensor_scale is not None and list(tensor_scale.shape) in ([1, 1], [count, 1])
    if tensor_scale is None or not known or tensor_scale.dtype != torch.float32:
        met = "no tensor_scale" if tensor_scale is None else f"tensor_scale of shape {list(tensor_scale.shape)}"
        raise ShapeMismatch(op, met, f"float32 of shape [1, 1] or [{count}, 1] for spec {spec}")


def _row_bytes(width: int, spec: TensorSpec) -> int:
    return (width * spec.format.bits + 7) // 8


def _spec_of(op: str, codes: Tensor, spec: str) -> TensorSpec:
    parsed = TensorSpec.parse(spec)
    if codes.dtype != held_dtype(parsed.code_dtype, codes.device) or codes.dim() == 0:
        met = f"codes of dtype {codes.dtype} and {codes.dim()} dimensions"
        raise ShapeMismatch(op, met, f"{parsed.code_dtype} of shape [..., K] for spec {parsed}")
    return parsed


def _check_rows(rows: Tensor, spec: str, width: int) -> TensorSpec:
    parsed = TensorSpec.parse(spec)
    if rows.dtype != torch.uint8 or rows.dim() == 0 or rows.shape[-1] != _row_bytes(width, parsed):
        met = f"rows of shape {list(rows.shape)} and dtype {rows.dtype}"
        raise ShapeMismatch(
            "fxquant.unpack_rows", met, f"uint8 [..., {_row_bytes(width, parsed)}] for {width} codes of {parsed}"
        )
    return parsed


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise GradientsNeedTraining(_DECODE)


declare(
    "pack_rows(Tensor codes, str spec) -> Tensor rows",
    reference=pack_rows,
    fake=_pack_rows_fake,
    backward=no_gradient,
)
declare(
    "unpack_rows(Tensor rows, str spec, int width) -> Tensor codes",
    reference=unpack_rows,
    fake=_unpack_rows_fake,
    backward=no_gradient,
)
declare(
    "decode_rows(Tensor rows, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, int width, str spec, "
    "ScalarType dtype) -> Tensor",
    reference=decode_rows,
    fake=_decode_rows_fake,
    backward=_refuse,
)
