"""Codes of 1 to 8 bits packed into bytes: how a checkpoint and an embedding table hold them (docs/formats.md).

Each row of the last axis is one little-endian bit stream: code k takes the bits k * b .. k * b + b - 1 of it, where bit
i is bit i % 8 of byte i // 8. A row starts at a byte of its own, and the bits behind its last code are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.held import held_dtype
from fxquant.spec import TensorSpec

BYTE = 8


def packed_bytes(width: int, bits: int) -> int:
    """Bytes that a row of `width` codes takes; works on symbolic sizes."""
    return (width * bits + BYTE - 1) // BYTE


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """The low `bits` bits of codes [..., K], of any one-byte dtype, as uint8 [..., ceil(K * bits / 8)]."""
    raw, width = codes.contiguous().view(torch.uint8), codes.shape[-1]
    if bits == BYTE:
        return raw.clone()
    # Eight codes are `bits` bytes: they meet in one integer.
    padded = torch.nn.functional.pad(raw & (2**bits - 1), (0, -width % BYTE)).unflatten(-1, (-1, BYTE))
    word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=codes.device)
    for k in range(BYTE):
        word |= padded[..., k].to(torch.int64) << (k * bits)
    packed = torch.stack([(word >> (BYTE * j)).to(torch.uint8) for j in range(bits)], -1).flatten(-2)
    return _dense(packed[..., : packed_bytes(width, bits)])


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., width], each code's bits as they are, the others 0."""
    if bits == BYTE:
        return packed.clone(memory_format=torch.contiguous_format)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=packed.device)
    for j in range(bits):
        word |= padded[..., j].to(torch.int64) << (BYTE * j)
    codes = torch.stack([((word >> (k * bits)) & (2**bits - 1)).to(torch.uint8) for k in range(BYTE)], -1)
    return _dense(codes.flatten(-2)[..., :width])


def _dense(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of single rows


def pack_codes_rows(codes: Tensor, spec: TensorSpec) -> Tensor:
    """Codes [..., K] of that spec as uint8 [..., ceil(K * bits / 8)]; symmetric integers in two's complement."""
    return pack_bits(codes, spec.format.bits)


def unpack_codes_rows(packed: Tensor, spec: TensorSpec, width: int) -> Tensor:
    """The inverse of `pack_codes_rows`: codes [..., width] in the spec's code dtype."""
    raw = unpack_bits(packed, spec.format.bits, width)
    if spec.code_dtype != torch.int8:
        return raw.view(held_dtype(spec.code_dtype, raw.device))
    unused = BYTE - spec.format.bits
    return (raw << unused).view(torch.int8) >> unused  # the shift back copies the sign
