"""Ranges against brute force on the values themselves."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.calibration.observers import Seen
from fxquant.calibration.ranges import OBSERVERS, _ErrorIntegral, chosen_range, mse, percentile
from fxquant.calibration.stats import scale_of
from fxquant.numerics import code_values, smallest_range
from fxquant.spec import FORMATS, NumberFormat, number_format

INT8 = FORMATS["int8"]
E4M3 = FORMATS["float8_e4m3fn"]
E5M2 = FORMATS["float8_e5m2"]
FP4 = FORMATS["fp4_e2m1"]


def seen(*batches: Tensor) -> Seen:
    state = Seen(0.9)
    for batch in batches:
        state.add(batch)
    return state


def draws(kind: str, count: int = 4000) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    normal = torch.randn(count, generator=generator)
    match kind:
        case "normal":
            return normal
        case "relu":
            return normal.relu()
        case "uniform":
            return torch.rand(count, generator=generator)
        case "heavy":
            return normal.double().pow(3).float()
        case "outlier":
            return torch.cat([normal, torch.tensor([30.0])])
        case _:
            raise AssertionError(kind)


def test_the_document_has_a_row_for_each_observer() -> None:
    text = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    assert re.findall(r"^\| `\"(\w+)\"` \|.*\|.*\|$", text.partition("| `observer=`")[2], re.M) == list(OBSERVERS)


KINDS = ("normal", "relu", "uniform", "heavy", "outlier")


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50).filter(lambda v: any(v)),
    st.floats(0.1, 100),
)
def test_percentile_is_that_of_the_values_to_the_width_of_a_bin(values: list[float], percent: float) -> None:
    state = seen(torch.tensor(values))
    magnitudes = sorted(map(abs, torch.tensor(values).tolist()))
    exact = magnitudes[max(0, math.ceil(percent / 100 * len(magnitudes)) - 1)]
    found = percentile(state, INT8, percent)
    assert abs(found - exact) <= state.histogram.width
    assert found <= magnitudes[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_hundredth_percentile_is_the_largest_value(kind: str) -> None:
    state = seen(draws(kind))
    assert percentile(state, INT8, 100.0) == state.absmax


@pytest.mark.parametrize("number", [INT8, E4M3, E5M2, FP4, number_format("int4")], ids=str)
def test_the_error_integral_is_the_integral(number: NumberFormat) -> None:
    grid = code_values(number).double()
    grid = grid[grid.isfinite() & (grid.abs() <= number.qmax)]
    top = 1.5 * number.qmax
    steps = torch.linspace(0, top, 400001, dtype=torch.float64)
    middles = (steps[1:] + steps[:-1]) / 2
    ordered = grid.unique()
    above = torch.searchsorted(ordered, middles).clamp(max=len(ordered) - 1)
    error = torch.minimum((ordered[above] - middles).abs(), (ordered[(above - 1).clamp(min=0)] - middles).abs())
    summed = error.square().cumsum(0) * float(steps[1])
    at = torch.arange(1000, 400000, 7777)
    torch.testing.assert_close(_ErrorIntegral(number)(steps[at + 1]), summed[at], rtol=1e-4, atol=0)


def rms(values: Tensor, extent: float, number: NumberFormat) -> float:
    """Of rounding with that range, from the values, in float64."""
    grid = code_values(number).double()
    grid = grid[grid.isfinite() & (grid.abs() <= number.qmax)].unique()
    scaled = values.double() / (extent / number.qmax)
    nearest = grid[torch.bucketize(scaled, (grid[1:] + grid[:-1]) / 2)]
    return float((nearest - scaled).square().mean().sqrt()) * extent / number.qmax


@pytest.mark.parametrize("number", [INT8, E4M3, FP4], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_the_best_range_by_brute_force(kind: str, number: NumberFormat) -> None:
    values = draws(kind)
    state = seen(*values.split(1000))
    found = mse(state, number, 0.0)
    best = min(rms(values, state.absmax * 2 ** (-k / 40), number) for k in range(360))
    # To move a value within its bin changes its error by the bin's width at most; the squared errors that are compared
    # are both off by that. In practice the search is within a hundredth.
    error = rms(values, found, number)
    assert error <= min(best + 2 * state.histogram.width, 1.02 * best)
    assert found <= state.absmax


def test_mse_cuts_what_absmax_and_minmax_keep() -> None:
    values = draws("outlier")
    state = seen(values)
    assert state.absmax == 30.0
    assert mse(state, FP4, 0.0) < 15.0
    assert rms(values, mse(state, FP4, 0.0), FP4) < 0.6 * rms(values, state.absmax, FP4)


def test_zeros_cost_nothing_under_mse() -> None:
    """Exact zeros are rounded without error: they must not move the range of what is not zero."""
    # One in 3 million is 100: the best range is so small that steps are finer than bins.
    values = torch.cat([draws("normal", 3 * 10**6), torch.tensor([100.0])])
    few, many = seen(values), seen(values, torch.zeros(10**7))
    assert 127 * few.histogram.width > mse(few, INT8, 0.0)
    assert mse(many, INT8, 0.0) == mse(few, INT8, 0.0)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("number", [INT8, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-45], [1e-38, 0.0], [3e38, -3e38], [1e-20]])
def test_a_scale_is_never_zero_and_its_reciprocal_is_finite(
    observer: str, number: NumberFormat, values: list[float]
) -> None:
    state = seen(torch.tensor(values))
    scale = scale_of(chosen_range(observer, state, number, 99.9), number)
    assert scale.dtype is torch.float32
    assert 0 < float(scale) < math.inf
    assert float(1 / scale) < math.inf
    if max(values) < smallest_range(number.qmax):
        assert chosen_range(observer, state, number, 99.9) == 1.0


def test_a_choice_of_zero_gives_way_to_the_largest_value() -> None:
    sparse = seen(torch.cat([torch.zeros(10**4), torch.tensor([5.0])]))
    assert percentile(sparse, INT8, 99.9) == 0.0
    assert chosen_range("percentile", sparse, INT8, 99.9) == 5.0
    last = Seen(0.0)
    last.add(torch.tensor([5.0]))
    last.add(torch.zeros(3))
    assert last.average == 0.0
    assert chosen_range("absmax", last, INT8, 99.9) == 5.0


def test_the_scale_of_one_batch_is_that_of_dynamic_quantization() -> None:
    for values in draws("normal").split(100):
        _, scale, *_ = torch.ops.fxquant.quantize_dynamic(values[None], "int8/tensor")
        assert torch.equal(scale.reshape(()), scale_of(chosen_range("absmax", seen(values), INT8, 0.0), INT8))
