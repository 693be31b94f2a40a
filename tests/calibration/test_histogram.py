"""The histogram: exact bins, whatever the order and the batches."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.calibration.histogram import BINS, CPU_PART, Histogram

VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
BATCH = st.lists(VALUES, min_size=1, max_size=20)


def counted(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch, float(batch.double().abs().max()))
    return histogram


def by_hand(values: Tensor, width: float) -> dict[int, int]:
    """{bin: count}; the division by a power of two is exact in float64."""
    bins = ((math.floor(abs(value) / width), value < 0) for value in values.double().flatten().tolist())
    return dict(Counter(BINS - 1 - i if below else BINS + i for i, below in bins))


def as_dict(histogram: Histogram) -> dict[int, int]:
    return {int(i): int(histogram.counts[i]) for i in histogram.counts.nonzero().flatten()}


@given(st.lists(BATCH, min_size=1, max_size=5))
def test_every_value_is_in_its_bin_however_the_batches_are_cut(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    whole = torch.cat(tensors)
    histogram = counted(*tensors)
    assert as_dict(histogram) == by_hand(whole, histogram.width)
    assert as_dict(histogram) == as_dict(counted(whole)) == as_dict(counted(*reversed(tensors)))
    assert histogram.zeros == int((whole == 0).sum())


@given(BATCH)
def test_a_bin_is_at_most_a_1024th_of_the_largest_value(batch: list[float]) -> None:
    largest = max(map(abs, batch))
    histogram = counted(torch.tensor(batch))
    assert largest < histogram.reach
    assert largest == 0 or histogram.width <= max(largest / 1024, 2.0**-111)


@pytest.mark.parametrize("values", [[1.4e-45], [3.4e38, -3.4e38], [1.4e-45, 3.4e38], [1.0, -1.0], [2.0**-100]])
def test_extremes(values: list[float]) -> None:
    histogram = counted(*(torch.tensor([value]) for value in values))
    assert as_dict(histogram) == by_hand(torch.tensor(values), histogram.width)


def test_zeros_widen_nothing() -> None:
    histogram = counted(torch.zeros(5), torch.tensor([-0.0, 1e-3]))
    assert histogram.zeros == 6
    assert histogram.width == 2.0**-9 / BINS  # 1e-3 is below 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(CPU_PART + 3,), (33, 31), ()])
def test_any_shape_dtype_and_stride(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    histogram = counted(values.mT if values.dim() > 1 else values)
    assert as_dict(histogram) == by_hand(values, histogram.width)


def test_magnitudes_fold_both_sides() -> None:
    histogram = counted(torch.tensor([-0.6, 0.6, 0.6, -0.1]))
    magnitudes = histogram.magnitudes()
    assert magnitudes.shape == (BINS,)
    assert int(magnitudes[int(0.6 * BINS)]) == 3
    assert int(magnitudes[int(0.1 * BINS)]) == 1
    assert histogram.edges.tolist() == [i / BINS for i in range(-BINS, BINS + 1)]
