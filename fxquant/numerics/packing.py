"""The int8 kernels' weight layout, in plain torch: one flat tensor of panels, 64 output features each.

A full panel is a permutation of its codes, [ceil(K / 4), 64, 4]: place [k4, c, j] holds code 4 * k4 + j of feature c, 0
where that is beyond K. The sums over k of the features' codes stand behind it as 64 int32, if that costs no more than
2 % of codes and scales: the compensation for activations that a kernel stores as u8 = code + 128. Else the kernel
sums up.

Features that no full panel holds (`numerics.panels.full_features`) follow as rows of K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.numerics.panels import PANEL, PARTS, full_features

QUAD = 4  # neighbours along K that one dot-product instruction sums up
_SUM_BYTES = 4


def packed_shape(out_features: int, in_features: int) -> list[int]:
    """Shape of the packed form of codes [out_features, in_features]; works on symbolic sizes."""
    full = full_features(out_features, in_features, QUAD)
    return [full * full_row_bytes(in_features) + (out_features - full) * in_features]


def pack_int8(codes: Tensor) -> Tensor:
    """int8 codes [N, K] -> int8 packed, flat; full panels first."""
    out_features, in_features = codes.shape
    full = full_features(out_features, in_features, QUAD)
    padding, panels = -in_features % QUAD, full // PANEL
    quads = pad(codes[:full], (0, padding)).view(panels, PANEL, (in_features + padding) // QUAD, QUAD)
    body = quads.transpose(1, 2).reshape(panels, PANEL * (in_features + padding))
    if _stores_sums(in_features):
        sums = codes[:full].sum(1, dtype=torch.int32).view(torch.int8).view(panels, PANEL * _SUM_BYTES)
        body = torch.cat([body, sums], 1)
    return torch.cat([body.flatten(), codes[full:].flatten()])


def unpack_int8(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of `pack_int8`: int8 codes [out_features, in_features], in memory of their own."""
    full = full_features(out_features, in_features, QUAD)
    padded, panels = in_features + -in_features % QUAD, full // PANEL
    body, rows = packed.split([full * full_row_bytes(in_features), (out_features - full) * in_features])
    quads = body.view(panels, PANEL * full_row_bytes(in_features))[:, : PANEL * padded]
    codes = quads.reshape(panels, padded // QUAD, PANEL, QUAD).transpose(1, 2).reshape(full, padded)
    return torch.cat([codes[:, :in_features], rows.view(out_features - full, in_features)])


def full_row_bytes(in_features: int) -> int:
    """What one feature takes in a full panel."""
    return in_features + -in_features % QUAD + (_SUM_BYTES if _stores_sums(in_features) else 0)


def _stores_sums(in_features: int) -> bool:
    return PARTS * (-in_features % QUAD + _SUM_BYTES) <= in_features + _SUM_BYTES  # a float32 scale beside the codes
