"""Some rows of a packed weight: the codes and granules of these, without unpacking the others.

In a panel 64 features stand side by side, so four neighbours along K of one feature are one 32-bit word. A row is
gathered word by word.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.numerics.bits import packed_bytes, unpack_bits
from fxquant.numerics.packing import QUAD
from fxquant.numerics.panels import BLOCK_K, PANEL, full_features, granules_along, pattern_codes, plane_widths
from fxquant.spec import TensorSpec

_COLUMNS = 16  # words of one plane row: features 16 * j + c for one j
_LANES = 0x01010101  # a bit for each byte of a word


def gather_int8(packed: Tensor, rows: Tensor, out_features: int, in_features: int) -> Tensor:
    """Codes int8 [n, in_features] of the rows int64 [n] of a weight that `pack_int8` packed."""
    full = full_features(out_features, in_features, QUAD)
    tail = (out_features - full) * in_features
    body, rest = packed.split([packed.numel() - tail, tail])
    quads = -(-in_features // QUAD)

    def of_panels(some: Tensor) -> Tensor:
        words = _words(body).view(full // PANEL, -1, PANEL)[:, :quads]  # behind these stand sums of codes, or nothing
        found = words[some // PANEL, :, some % PANEL]
        return found.view(torch.int8)[:, :in_features]

    by_row = rest.view(out_features - full, in_features)
    return _of_both(rows, full, of_panels, lambda some: by_row[some])


def gather_panels(packed: Tensor, rows: Tensor, out_features: int, in_features: int, spec: TensorSpec) -> Tensor:
    """Codes [n, in_features] of the rows int64 [n] of a weight that `pack_panels` packed."""
    full, bits = full_features(out_features, in_features, BLOCK_K), spec.format.bits
    row_bytes = packed_bytes(in_features, bits)
    tail = (out_features - full) * row_bytes
    body, rest = packed.split([packed.numel() - tail, tail])

    def of_panels(some: Tensor) -> Tensor:
        words = _words(body).view(full // PANEL, -1, bits, _COLUMNS)
        panel, column = some // PANEL, some % _COLUMNS
        # The two vectors of 8 neighbours along K that hold the feature: of the first four, of the others.
        vectors = torch.stack([some % PANEL // _COLUMNS, some % PANEL // _COLUMNS + BLOCK_K // 2], 1)
        blocks = torch.arange(words.shape[1], device=some.device).view(1, -1, 1)
        found = words.new_zeros([some.shape[0], words.shape[1], 2])
        first = 0
        for width in plane_widths(bits):
            row = (first + vectors % width)[:, None]
            plane = words[panel[:, None, None], blocks, row, column[:, None, None]]
            slots = plane >> (vectors // width * width)[:, None].to(torch.int32)
            found |= (slots & (_LANES * (2**width - 1))) << first
            first += width
        return found.view(torch.uint8).flatten(1)[:, :in_features]

    by_row = rest.view(out_features - full, row_bytes)
    patterns = _of_both(rows, full, of_panels, lambda some: unpack_bits(by_row[some], bits, in_features))
    return pattern_codes(patterns, spec)


def gather_granules(packed: Tensor, rows: Tensor, spec: TensorSpec, out_features: int, in_features: int) -> Tensor:
    """Scales (zero points, shifts) [n, granules along K] of the rows int64 [n], of what `pack_granules` packed."""
    raw = packed.view(torch.uint8) if packed.dtype.itemsize == 1 else packed
    along, full = granules_along(in_features, spec), out_features // PANEL * PANEL
    each = torch.arange(along, device=rows.device)
    if spec.granularity.kind == "block":
        at = (rows // spec.granularity.rows * along)[:, None] + each
    elif spec.granularity.kind == "tensor" and packed.shape[0] == 1:
        at = torch.zeros_like(rows)[:, None]
    else:
        last = rows >= full
        first = torch.where(last, full * along + rows - full, rows // PANEL * PANEL * along + rows % PANEL)
        at = first[:, None] + each * torch.where(last, out_features - full, PANEL)[:, None]
    return raw[at].view(packed.dtype)


def _of_both(
    rows: Tensor, full: int, of_panels: Callable[[Tensor], Tensor], of_rest: Callable[[Tensor], Tensor]
) -> Tensor:
    """What stands in full panels, rows below `full`, and what follows them; in the order of `rows`."""
    in_rest = rows >= full
    if not bool(in_rest.any()):
        return of_panels(rows)
    if bool(in_rest.all()):
        return of_rest(rows - full)
    later = of_rest(rows[in_rest] - full)
    found = later.new_empty([rows.shape[0], later.shape[1]])
    found[in_rest] = later
    found[~in_rest] = of_panels(rows[~in_rest])
    return found


def _words(packed: Tensor) -> Tensor:
    """Bytes as int32; a copy where the bytes begin in the middle of a word of their storage."""
    packed = packed.contiguous()
    return (packed if packed.storage_offset() % 4 == 0 else packed.clone()).view(torch.int32)
