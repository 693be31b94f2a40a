"""The Triton kernels' layout of a weight in any format, in plain torch: rows of chunks of bit planes.

A row of codes is cut along K into chunks of `parts_of` parts with `part_width` columns each: as many parts as codes
share a byte in the narrowest plane. The bits of a code are kept in planes whose widths are the powers of two in the
format's bits, widest first (6 = 4 + 2); the first plane holds the low bits. In each plane of width w a chunk has
parts * w / 8 stretches of `part_width` bytes: byte j of stretch r holds column j of the parts r * (8 / w) + s, s = 0,
1, ..., shifted left by w * s. So one load of a stretch, a shift and a mask give a whole part: neighbours along K, as
many as one matrix instruction or several take. 8-bit formats lie as they are, K filled up to 64.

Bytes are patterns: code + 2^(bits - 1) of a symmetric integer below 8 bits, the code's own bits else (8-bit integers in
two's complement). Columns beyond K hold the pattern of code 0; a kernel reads 0 of x there, or masks.

Scales, zero points and shifts are transposed, [granules along K, N], one row of them for each granule: neighbours in N
are neighbours in memory, as the columns of a tile are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.numerics.panels import granules_along, pattern_codes, plane_widths
from fxquant.spec import TensorSpec

BYTE = 8
WIDE, NARROW = 64, 32


def parts_of(bits: int) -> int:
    """Parts of a chunk: how many codes share a byte of the narrowest plane."""
    return BYTE // plane_widths(bits)[-1]


def part_width(bits: int) -> int:
    """Columns of a part: 64, or 32 where a chunk has 8 parts."""
    return NARROW if parts_of(bits) == BYTE else WIDE


def chunk_width(bits: int) -> int:
    """Columns of a chunk: 64 of 8 bits, 128 of 4, 256 of all others."""
    return parts_of(bits) * part_width(bits)


def tiles_shape(out_features: int, in_features: int, spec: TensorSpec) -> list[int]:
    """Shape of the tiles of codes [out_features, in_features]; works on symbolic sizes."""
    bits = spec.format.bits
    chunk = chunk_width(bits)
    return [out_features, (in_features + chunk - 1) // chunk * (chunk * bits // BYTE)]


def pack_tiles(codes: Tensor, spec: TensorSpec) -> Tensor:
    """Codes [N, K] of the spec -> uint8 [N, bytes]."""
    bits, flip = spec.format.bits, tile_flip(spec)
    patterns = (codes.contiguous().view(torch.uint8) & (2**bits - 1)) ^ flip
    chunk, width = chunk_width(bits), part_width(bits)
    filled = pad(patterns, (0, -codes.shape[1] % chunk), value=flip)
    parts = filled.view(codes.shape[0], filled.shape[1] // chunk, parts_of(bits), width)
    planes, below = [], 0
    for plane in plane_widths(bits):
        slots = ((parts >> below) & (2**plane - 1)).unflatten(2, (-1, BYTE // plane))
        stretch = slots[:, :, :, 0]
        for slot in range(1, BYTE // plane):
            stretch = stretch | (slots[:, :, :, slot] << (plane * slot))
        planes.append(stretch)
        below += plane
    return torch.cat(planes, 2).flatten(1)


def unpack_tiles(tiles: Tensor, in_features: int, spec: TensorSpec) -> Tensor:
    """The inverse of `pack_tiles`: codes [N, in_features] in the spec's code dtype, contiguous."""
    bits = spec.format.bits
    chunk, width, parts = chunk_width(bits), part_width(bits), parts_of(bits)
    stretches = tiles.view(tiles.shape[0], tiles.shape[1] * BYTE // bits // chunk, parts * bits // BYTE, width)
    patterns = tiles.new_zeros([*stretches.shape[:2], parts, width])
    row = below = 0
    for plane in plane_widths(bits):
        rows = parts * plane // BYTE
        stretch = stretches[:, :, row : row + rows]
        slots = torch.stack([stretch >> (plane * slot) for slot in range(BYTE // plane)], 3).flatten(2, 3)
        patterns |= (slots & (2**plane - 1)) << below
        row, below = row + rows, below + plane
    plain = patterns.flatten(1)[:, :in_features].contiguous()
    if spec.format.kind == "int" and not tile_flip(spec):
        return plain.view(spec.code_dtype)
    return pattern_codes(plain, spec)


def transpose_granules(t: Tensor, spec: TensorSpec, out_features: int, in_features: int) -> Tensor:
    """Scales (zero points, shifts) in the shape of the spec's granularity -> [granules along K, N], in their own dtype.

    One number of a whole tensor is repeated for each row, that of a block for each of its rows.
    """
    raw = t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 else t
    granules = granules_along(in_features, spec)
    if spec.granularity.kind == "block":
        raw = raw.view(-1, granules).repeat_interleave(spec.granularity.rows, 0)[:out_features]
    return raw.expand(out_features, granules).t().clone(memory_format=torch.contiguous_format).view(t.dtype)


def tile_flip(spec: TensorSpec) -> int:
    """What a pattern differs from a code's own bits by: the sign bit of symmetric integers below 8 bits."""
    narrow = spec.format.kind == "int" and spec.format.bits < BYTE and not spec.has_zero_point
    return 2 ** (spec.format.bits - 1) if narrow else 0


def scaled_by_blocks(spec: TensorSpec, x_spec: TensorSpec | None) -> bool:
    """Both sides are of OCP MX's or NVFP4's kind: floats in groups with a scale of one byte.

    Kernels of that kind read a weight in the storage form, not in tiles.
    """
    sides = (spec, x_spec)
    return all(side is not None and side.scale in ("e8m0", "e4m3") and side.format.kind == "float" for side in sides)
