"""The int8 kernels' weight layout, in plain torch: a permutation of the codes, and one row of column sums per block.

packed[b, k4, c, j] = codes[64 * b + c, 4 * k4 + j], zero where that is outside of codes [N, K]. The last row of each
block holds, as 64 int32, the sum over k of each column's codes: the compensation for activations that a kernel stores
as u8 = code + 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # output features a block: four AVX512 registers of 16 int32 sums
QUAD = 4  # neighbours along K that one dot-product instruction sums up


def packed_shape(out_features: int, in_features: int) -> list[int]:
    """Shape of the packed form of codes [out_features, in_features]; works on symbolic sizes."""
    return [(out_features + BLOCK - 1) // BLOCK, (in_features + QUAD - 1) // QUAD + 1, BLOCK, QUAD]


def pack_int8(codes: Tensor) -> Tensor:
    """int8 codes [N, K] -> int8 packed [ceil(N / 64), ceil(K / 4) + 1, 64, 4]."""
    out_features, in_features = codes.shape
    blocks, rows, _, _ = packed_shape(out_features, in_features)
    padded = codes.new_zeros(blocks * BLOCK, (rows - 1) * QUAD)
    padded[:out_features, :in_features] = codes
    body = padded.view(blocks, BLOCK, rows - 1, QUAD).permute(0, 2, 1, 3)
    sums = padded.sum(1, dtype=torch.int32).view(torch.int8).view(blocks, 1, BLOCK, QUAD)
    return torch.cat([body, sums], dim=1).contiguous()


def unpack_int8(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of `pack_int8`: int8 codes [out_features, in_features], in memory of their own."""
    blocks, rows, _, _ = packed.shape
    body = packed[:, :-1].permute(0, 2, 1, 3).reshape(blocks * BLOCK, (rows - 1) * QUAD)
    return body[:out_features, :in_features].clone(memory_format=torch.contiguous_format)
