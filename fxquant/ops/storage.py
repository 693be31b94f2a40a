"""pack_rows and unpack_rows: codes as the bit streams that a checkpoint and an embedding table hold."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ShapeMismatch
from fxquant.numerics import pack_codes_rows, unpack_codes_rows
from fxquant.ops.library import declare, no_gradient
from fxquant.spec import TensorSpec


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
    return rows.new_empty([*rows.shape[:-1], width], dtype=_check_rows(rows, spec, width).code_dtype)


def _row_bytes(width: int, spec: TensorSpec) -> int:
    return (width * spec.format.bits + 7) // 8


def _spec_of(op: str, codes: Tensor, spec: str) -> TensorSpec:
    parsed = TensorSpec.parse(spec)
    if codes.dtype != parsed.code_dtype or codes.dim() == 0:
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
