"""From what was seen of a tensor to the range that its scale covers: one function for each observer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.calibration.observers import Seen
from fxquant.numerics import code_values, smallest_range
from fxquant.spec import NumberFormat

# mse: ranges so many to an octave, over so many octaves below the largest value; then finer ones around the best.
STEPS = 8
OCTAVES = 9
FINER = 17


def absmax(seen: Seen, number: NumberFormat, percent: float) -> float:
    """The moving average of the batches' largest absolute values."""
    return seen.average


def minmax(seen: Seen, number: NumberFormat, percent: float) -> float:
    """The largest absolute value of all batches."""
    return seen.absmax


def percentile(seen: Seen, number: NumberFormat, percent: float) -> float:
    """What `percent` % of the absolute values do not exceed, to the width of a bin; 100 gives the largest itself."""
    histogram = seen.histogram
    counts = histogram.magnitudes()
    total = int(counts.sum())
    wanted = percent / 100 * total
    if wanted <= histogram.zeros or not seen.absmax:
        return 0.0
    below = counts.cumsum(0)
    found = int(torch.searchsorted(below.double(), wanted))
    inside = (wanted - (int(below[found]) - int(counts[found]))) / int(counts[found])
    return min((found + inside) * histogram.width, seen.absmax)


def mse(seen: Seen, number: NumberFormat, percent: float) -> float:
    """The range, at most the largest absolute value, whose rounding and clipping leave the least squared error.

    Values count as spread evenly over their bins; zeros as zeros. The range is found to about a thousandth of itself.
    """
    counts = seen.histogram.magnitudes().double()
    counts[0] -= seen.histogram.zeros
    used = counts.nonzero()
    if not len(used):
        return 0.0
    counts = counts[: int(used[-1]) + 1]
    edges = torch.arange(len(counts) + 1, dtype=torch.float64, device="cpu") * seen.histogram.width
    error = _ErrorIntegral(number)
    exponents = -torch.arange(STEPS * OCTAVES + 1, dtype=torch.float64, device="cpu") / STEPS
    best, step = 0.0, 1 / STEPS
    for _ in range(3):
        scales = seen.absmax * torch.exp2(exponents) / number.qmax
        squared = (error(edges / scales[:, None]).diff(dim=1) * counts).sum(1) * scales**3
        best = float(exponents[squared.argmin()])
        # The first is what it was: of equals the wider range wins, in every round.
        exponents = torch.linspace(min(best + step, 0.0), best - step, FINER, dtype=torch.float64, device="cpu")
        step = 2 * step / (FINER - 1)
    return seen.absmax * 2.0**best


class _ErrorIntegral:
    """The integral from 0 to t of (u - nearest(u))^2 du, where nearest is on the format's grid and saturates."""

    def __init__(self, number: NumberFormat) -> None:
        values = code_values(number, "cpu").double()
        self._grid = values[(values >= 0) & (values <= number.qmax)].unique()
        middles = (self._grid[1:] + self._grid[:-1]) / 2
        self._starts = torch.cat([middles.new_zeros(1), middles])
        cells = _third_power(middles - self._grid[:-1]) - _third_power(self._starts[:-1] - self._grid[:-1])
        self._before = torch.cat([middles.new_zeros(1), cells.cumsum(0)])

    def __call__(self, t: Tensor) -> Tensor:
        """t: float64, at least 0."""
        cell = torch.bucketize(t, self._starts[1:])
        nearest = self._grid[cell]
        return self._before[cell] + _third_power(t - nearest) - _third_power(self._starts[cell] - nearest)


def _third_power(t: Tensor) -> Tensor:
    return t**3 / 3


OBSERVERS: dict[str, Callable[[Seen, NumberFormat, float], float]] = {
    "absmax": absmax,
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}


def chosen_range(observer: str, seen: Seen, number: NumberFormat, percent: float) -> float:
    """The range that the observer chooses; where that is 0, or too small to divide by, the largest value; else 1."""
    smallest = smallest_range(number.qmax)
    candidates = (OBSERVERS[observer](seen, number, percent), seen.absmax)
    return next((found for found in candidates if found >= smallest), 1.0)
