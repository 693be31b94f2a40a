"""Counts of values in equal bins around 0, which widen as larger values come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_BINS = 11
BINS = 2**LOG_BINS  # on each side of 0
SMALLEST_EXPONENT = -100  # the reach before the first value that is not 0; the counting factor stays finite
MOST_DOUBLINGS = 62  # shifts of int64
# 256 KB of float32: a part and its temporaries stay in the second-level cache.
CPU_PART = 2**16
DEVICE_PART = 2**24


class Histogram:
    """4096 bins from -reach to reach, a power of two: O(bins) memory for any number of values.

    counts  int64 [2 * BINS] on the CPU: bin BINS + i holds the values from i * width to below (i + 1) * width, and bin
            BINS - 1 - i those from -i * width to above -(i + 1) * width, without -0.
    zeros   how many of the values are 0.

    Larger values double the reach, as often as they must, and bins join by twos. All bounds are powers of two times
    integers, so that no value is ever counted in a wrong bin, and the counts depend neither on the order of the values
    nor on how they were cut into batches. The width is at most 1/1024 of the largest absolute value.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * BINS, dtype=torch.int64, device="cpu")
        self.zeros = 0
        self._exponent = SMALLEST_EXPONENT

    @property
    def reach(self) -> float:
        """The upper bound of the last bin."""
        return math.ldexp(1.0, self._exponent)

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self._exponent - LOG_BINS)

    @property
    def edges(self) -> Tensor:
        """float64 [2 * BINS + 1]."""
        return torch.arange(-BINS, BINS + 1, dtype=torch.float64, device="cpu") * self.width

    def magnitudes(self) -> Tensor:
        """Counts of absolute values, int64 [BINS], in bins of the same width from 0 on."""
        return self.counts[BINS:] + self.counts[:BINS].flip(0)

    def add(self, values: Tensor, largest: float) -> None:
        """Count `values`, of any shape and device, finite in float32; `largest` is their largest absolute value."""
        self._widen(math.frexp(largest)[1] if largest else SMALLEST_EXPONENT)
        factor = math.ldexp(1.0, LOG_BINS - self._exponent)
        flat = values.reshape(-1)
        counts = torch.zeros(2 * BINS, dtype=torch.int64, device=flat.device)
        for part in flat.split(CPU_PART if flat.device.type == "cpu" else DEVICE_PART):
            bins = (part.to(torch.float32) * factor).to(torch.int32)  # towards 0
            bins.sub_((part < 0).to(torch.int32)).add_(BINS)
            counts += torch.bincount(bins, minlength=2 * BINS)
        self.counts += counts.cpu()
        self.zeros += flat.numel() - int(torch.count_nonzero(flat))

    def _widen(self, exponent: int) -> None:
        doublings = exponent - self._exponent
        if doublings <= 0:
            return
        joined = torch.arange(-BINS, BINS, device="cpu") >> min(doublings, MOST_DOUBLINGS)
        self.counts = torch.zeros_like(self.counts).index_add_(0, joined + BINS, self.counts)
        self._exponent = exponent
