"""Between the kernels' layouts of codes and the rows of a checkpoint, without a code a byte in between.

Both are permutations of the same bits, so codes of 8 and 4 bits are moved as words of 32: four neighbours along K, or
eight, of one feature (docs/formats.md). Other widths go by way of codes. Either way a few panels are done at a time:
what is in hand stays in the caches, and memory is taken for the result alone. Kernels do the same for the ops of these
names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.numerics.bits import pack_codes_rows, packed_bytes, unpack_codes_rows
from fxquant.numerics.packing import QUAD, full_row_bytes
from fxquant.numerics.panels import BLOCK_K, PANEL, full_features, pack_panels, unpack_panels
from fxquant.spec import TensorSpec

_AT_ONCE = 1 << 18  # bytes
_WORD = 4  # bytes
_BY_BLOCKS = 60 * 60  # the least size for that, in torch's copy
# A word of the panels holds the codes k 0, 4, 1, 5, 2, 6, 3, 7: of its nibbles 1 and 2, 5 and 6 are exchanged, then 2
# and 4, 3 and 5.
_SWAPS = ((4, 0x00F000F0), (8, 0x0000FF00))


def rows_of_packed(
    packed: Tensor, shape: tuple[int, int], spec: TensorSpec, layout: str, begin: int, end: int
) -> Tensor:
    """Rows begin <= n < end, whole panels, of a checkpoint of a packed weight of that shape [N, K]: uint8 [n, bytes].

    layout: "int8" (pack_int8) or "panels" (pack_panels), flat.
    """
    plan = _Plan(shape, spec, layout)
    rows = torch.empty(end - begin, plan.row_bytes, dtype=torch.uint8, device=packed.device)
    for first, last in plan.chunks(begin, end):
        part = packed[plan.start(first) : plan.start(last)]
        rows[first - begin : last - begin] = plan.rows(part, last - first, in_panels=first < plan.full)
    return rows


def packed_of_rows(rows: Tensor, columns: int, spec: TensorSpec, layout: str) -> Tensor:
    """The inverse: uint8 rows [N, bytes of a row] at any address -> the packed codes, flat, in memory of their own."""
    plan = _Plan((rows.shape[0], columns), spec, layout)
    dtype = torch.int8 if layout == "int8" else torch.uint8
    packed = torch.empty(plan.start(plan.features), dtype=dtype, device=rows.device)
    for first, last in plan.chunks(0, plan.features):
        plan.fill(packed[plan.start(first) : plan.start(last)], rows[first:last], in_panels=first < plan.full)
    return packed


class _Plan:
    """Where the features of a weight lie in its layout, and how some of them become rows and back."""

    def __init__(self, shape: tuple[int, int], spec: TensorSpec, layout: str) -> None:
        self.features, self.columns = shape
        self.spec, self.layout, self.bits = spec, layout, spec.format.bits
        unit = QUAD if layout == "int8" else BLOCK_K
        self.full = full_features(*shape, unit)
        self.row_bytes = packed_bytes(self.columns, self.bits)
        self.filled_bytes = (self.columns + -self.columns % unit) * self.bits // 8
        self.full_bytes = full_row_bytes(self.columns) if layout == "int8" else self.filled_bytes
        self.by_words = self.bits == 8 or (self.bits == 4 and self.columns % 2 == 0)
        is_flipped = layout == "panels" and spec.format.kind == "int" and not spec.has_zero_point
        self.flip = (-0x7F7F7F80 if self.bits == 8 else -0x77777778) if is_flipped else 0  # the highest bit of codes

    def chunks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """First feature and end, of as many whole panels as are done at a time, then of the rows behind them."""
        step = max(1, _AT_ONCE // max(1, PANEL * self.row_bytes)) * PANEL
        full = min(end, self.full)
        for first in range(begin, full, step):
            yield first, min(first + step, full)
        if end > max(begin, self.full):
            yield max(begin, self.full), end

    def start(self, feature: int) -> int:
        """Where a feature, the first of a chunk, begins in the packed codes."""
        return min(feature, self.full) * self.full_bytes + max(0, feature - self.full) * self.row_bytes

    def rows(self, part: Tensor, count: int, *, in_panels: bool) -> Tensor:
        if not self.by_words:
            return pack_codes_rows(unpack_panels(part, count, self.columns, self.spec), self.spec)
        if not in_panels:
            return part.view(torch.uint8).view(count, self.row_bytes) ^ (self.flip & 0xFF)
        words = self._words(part)
        out = torch.empty(words.shape[0], PANEL, words.shape[1], dtype=torch.int32, device=part.device)
        _transpose(words, out)
        if self.bits == 4:
            _exchange_nibbles(out, _SWAPS)
        if self.flip:
            out.bitwise_xor_(self.flip)
        return out.view(count, -1).view(torch.uint8)[:, : self.row_bytes].contiguous()

    def fill(self, part: Tensor, rows: Tensor, *, in_panels: bool) -> None:
        if not self.by_words:
            codes = unpack_codes_rows(rows, self.spec, self.columns)
            part.copy_(pack_panels(codes, self.spec))
        elif not in_panels:
            part.view(torch.uint8).copy_((rows ^ (self.flip & 0xFF)).flatten())
        else:
            self._fill_panels(part, rows)

    def _fill_panels(self, part: Tensor, rows: Tensor) -> None:
        filled = rows
        if missing := self.filled_bytes - self.row_bytes:
            filled = pad(rows, (0, missing))
        elif self.flip or self.bits == 4 or rows.data_ptr() % _WORD or not rows.is_contiguous():
            filled = rows.clone(memory_format=torch.contiguous_format)
        words = filled.view(torch.int32).view(-1, PANEL, self.filled_bytes // _WORD)
        if self.flip:
            words.bitwise_xor_(self.flip)
        if self.bits == 4:
            _exchange_nibbles(words, _SWAPS[::-1])
        _transpose(words, self._words(part))
        if self.full_bytes > self.filled_bytes:
            codes = rows.view(torch.int8)
            # Sums of floats are exact up to 2^24, and fast.
            exact = codes.float().sum(1) if self.columns <= 1 << 17 else codes.sum(1, dtype=torch.int32)
            sums = exact.to(torch.int32).view(torch.int8)
            part.view(-1, PANEL * self.full_bytes)[:, PANEL * self.filled_bytes :].copy_(sums.view(-1, PANEL * _WORD))

    def _words(self, part: Tensor) -> Tensor:
        """The words of full panels: [panels, words of a row, 64]."""
        words = part.view(torch.int32).view(-1, PANEL * self.full_bytes // _WORD)
        return words[:, : PANEL * self.filled_bytes // _WORD].unflatten(1, (-1, PANEL))


def _transpose(source: Tensor, target: Tensor) -> None:
    """target[i] = source[i].t(); one by one, which torch does by blocks that fit its caches."""
    if target[0].numel() < _BY_BLOCKS:
        target.copy_(source.transpose(1, 2))
        return
    for one, other in zip(source.unbind(), target.unbind(), strict=True):
        other.copy_(one.t())


def _exchange_nibbles(words: Tensor, swaps: tuple[tuple[int, int], ...]) -> None:
    """In each word of 32 bits, exchange the bits of a mask with those so many places above them, swap by swap."""
    for shift, mask in swaps:
        differ = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
        words.bitwise_xor_(differ).bitwise_xor_(differ << shift)
