"""What is kept of the batches of one tensor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.calibration.observers import Seen


def seen(*batches: torch.Tensor, momentum: float = 0.9) -> Seen:
    state = Seen(momentum)
    assert all([state.add(batch) for batch in batches])
    return state


@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=12),
    st.floats(0, 1, exclude_max=True),
)
def test_the_moving_average_is_the_closed_form(largest: list[float], momentum: float) -> None:
    state = seen(*(torch.tensor([-value, value / 2]) for value in largest), momentum=momentum)
    first, *rest = largest
    closed = math.fsum(
        [momentum ** len(rest) * first]
        + [(1 - momentum) * momentum ** (len(rest) - i) * value for i, value in enumerate(rest, 1)]
    )
    # A step rounds three times, each by half a unit of numbers that are no larger than the largest.
    assert abs(state.average - closed) <= 4 * len(largest) * 2.0**-53 * max(largest)


@given(st.floats(0, 2.0**100, width=32), st.floats(0, 1, exclude_max=True))
def test_equal_batches_give_their_value_exactly(value: float, momentum: float) -> None:
    assert seen(*[torch.tensor([value])] * 5, momentum=momentum).average == value


def test_extremes_and_counts() -> None:
    state = seen(
        torch.tensor([1.0, 2.0]),
        torch.tensor([-3.0]),
        torch.empty(0, 4),
        torch.tensor(0.5),
        torch.ones(2, device="meta"),
    )
    assert (state.minimum, state.maximum, state.absmax, state.batches) == (-3.0, 2.0, 3.0, 3)
    assert int(state.histogram.counts.sum()) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(bad: float, dtype: torch.dtype) -> None:
    state = seen(torch.tensor([1.0]))
    assert not state.add(torch.tensor([9.0, bad], dtype=dtype))
    assert (state.minimum, state.maximum, state.average, state.batches) == (1.0, 1.0, 1.0, 1)
    assert int(state.histogram.counts.sum()) == 1


def test_float64_is_what_float32_makes_of_it() -> None:
    almost_one = torch.tensor([1 - 1e-12], dtype=torch.float64)
    state = seen(almost_one)
    assert state.absmax == 1.0
    assert int(state.histogram.counts.sum()) == 1
    assert not state.add(torch.tensor([1e300], dtype=torch.float64))


def test_batches_with_and_without_inference_mode_and_gradients() -> None:
    state = Seen(0.0)
    with torch.inference_mode():
        state.add(torch.ones(2))
    state.add(torch.ones(2, requires_grad=True))
    state.add(torch.ones(2, requires_grad=True) * 3)
    with torch.inference_mode():
        state.add(torch.full((2,), 2.0))
    assert (state.average, state.maximum, state.batches) == (2.0, 3.0, 4)
    assert not state.histogram.counts.is_inference()
