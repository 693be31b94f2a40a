"""The kernels' layout of a weight in any format, in plain torch: codes in panels of bit planes, granules by panel.

A panel holds 64 output features, and of these, block by block, 8 neighbours along K. A block's 512 codes are 8 vectors
of 64 bytes: byte 4 * c + i of vector 4 * q + j belongs to feature 16 * j + c and k = 4 * q + i. Their bits are kept in
planes whose widths are the powers of two in the format's bits, widest first (6 = 4 + 2); the first plane holds the low
bits. A plane of width w has w rows of 64 bytes: row r holds the vectors r, r + w, r + 2w, ... of which the one with
index s is shifted left by w * s. So each format takes the bits it says, and a shift and a mask restore a vector.

What is packed is a code's pattern: code + 2^(bits - 1) of a symmetric integer, the code's own bits else. Places outside
of the weight hold the pattern of code 0, or their granule is 0.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.spec import CHANNEL, TensorSpec, group

PANEL = 64  # output features
BLOCK_K = 8
BYTE = 8


def panel_shape(out_features: int, in_features: int, spec: TensorSpec) -> list[int]:
    """Shape of the packed codes [out_features, in_features] of a spec; works on symbolic sizes."""
    blocks = (in_features + BLOCK_K - 1) // BLOCK_K
    return [_panels(out_features), blocks, spec.format.bits, PANEL]


def pack_panels(codes: Tensor, spec: TensorSpec) -> Tensor:
    """Codes [N, K] of the spec -> uint8 [ceil(N / 64), ceil(K / 8), bits, 64]."""
    out_features, in_features = codes.shape
    panels, blocks, bits, _ = panel_shape(out_features, in_features, spec)
    flip = _flip(spec)
    patterns = (codes.contiguous().view(torch.uint8) & (2**bits - 1)) ^ flip
    patterns = pad(patterns, (0, blocks * BLOCK_K - in_features, 0, panels * PANEL - out_features), value=flip)
    vectors = patterns.view(panels, 4, 16, blocks, 2, 4).permute(0, 3, 4, 1, 2, 5).reshape(panels, blocks, BYTE, PANEL)
    planes, below = [], 0
    for width in _widths(bits):
        slots = ((vectors >> below) & (2**width - 1)).view(panels, blocks, BYTE // width, width, PANEL)
        plane = slots[:, :, 0]
        for slot in range(1, BYTE // width):
            plane = plane | (slots[:, :, slot] << (width * slot))
        planes.append(plane)
        below += width
    return torch.cat(planes, 2).contiguous()


def unpack_panels(packed: Tensor, out_features: int, in_features: int, spec: TensorSpec) -> Tensor:
    """The inverse of `pack_panels`: codes [out_features, in_features] in the spec's code dtype, contiguous."""
    panels, blocks, bits, _ = panel_shape(out_features, in_features, spec)
    vectors = packed.new_zeros([panels, blocks, BYTE, PANEL])
    row = 0
    for width in _widths(bits):
        plane = packed[:, :, row : row + width]
        slots = torch.cat([plane >> (width * slot) for slot in range(BYTE // width)], 2)
        vectors |= (slots & (2**width - 1)) << row  # as many bits lie below a plane as it has rows above it
        row += width
    patterns = vectors.view(panels, blocks, 2, 4, 16, 4).permute(0, 3, 4, 1, 2, 5)
    patterns = patterns.reshape(panels * PANEL, blocks * BLOCK_K)[:out_features, :in_features]
    patterns = patterns.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of single rows
    flip = _flip(spec)
    if not flip:
        return patterns.view(spec.code_dtype)
    return (patterns.to(torch.int16) - flip).to(torch.int8)


def granule_shape(out_features: int, in_features: int, spec: TensorSpec) -> list[int]:
    """Shape of the packed scales, zero points or shifts of a weight [out_features, in_features]; symbolic sizes too."""
    granules = 1
    if spec.granularity.kind in ("group", "block"):
        size = spec.granularity.size
        granules = (in_features + size - 1) // size
    return [_panels(out_features), granules, PANEL]


def pack_granules(t: Tensor, spec: TensorSpec, out_features: int, in_features: int) -> Tensor:
    """Scales (zero points, shifts) in the shape of the spec's granularity -> [ceil(N / 64), granules along K, 64].

    t: [1, 1] and [N, 1] too where one stands for a whole row. Keeps the dtype. Padded features are 0.
    """
    panels, granules, _ = granule_shape(out_features, in_features, spec)
    raw = t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 else t
    if spec.granularity.kind == "block":
        raw = raw.repeat_interleave(spec.granularity.rows, 0)[:out_features]
    rows = pad(raw.expand(out_features, granules), (0, 0, 0, panels * PANEL - out_features))
    by_panel = rows.view(panels, PANEL, granules).transpose(1, 2)
    return by_panel.clone(memory_format=torch.contiguous_format).view(t.dtype)


def unpack_granules(packed: Tensor, out_features: int) -> Tensor:
    """What each row has, [out_features, granules along K]; of a block its number is repeated for each of its rows."""
    raw = packed.view(torch.uint8) if packed.dtype.itemsize == 1 else packed
    rows = raw.transpose(1, 2).reshape(-1, raw.shape[1])[:out_features]
    return rows.contiguous().view(packed.dtype)


def rows_spec(spec: TensorSpec) -> TensorSpec:
    """The spec whose scales are those of `unpack_granules`: by channel, or by group along K."""
    size = spec.granularity.size
    return dataclasses.replace(spec, granularity=group(size) if size else CHANNEL)


def fits_panels(spec: TensorSpec) -> bool:
    """True if a weight [N, K] of that spec has a panel form: of channels, only those of axis 0, written as 0."""
    return spec.granularity.kind in ("tensor", "token", "group", "block") or spec.granularity == CHANNEL


def _panels(out_features: int) -> int:
    return (out_features + PANEL - 1) // PANEL


def _flip(spec: TensorSpec) -> int:
    return 2 ** (spec.format.bits - 1) if spec.format.kind == "int" and not spec.has_zero_point else 0


def _widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]
