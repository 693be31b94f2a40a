"""mse: the range of each granule is shrunk to where the squared error of its values is least.

Values beyond the range saturate, all others get finer steps. The search is over a fixed list of ranges and picks the
best for each granule by itself; the plain range is among them, so that no granule has a larger squared error than under
absmax or minmax.
"""

from __future__ import annotations

from torch import Tensor

from fxquant.algorithms.candidates import candidates, least_squares
from fxquant.algorithms.ranges import Range
from fxquant.algorithms.rows import Rows
from fxquant.spec import TensorSpec


def mse_range(rows: Rows, plain: Range, spec: TensorSpec, tensor_scale: Tensor | None) -> Range:
    """The range of each granule that leaves the least squared error; `plain` and the result are [g, 1] a side."""
    return least_squares(rows, candidates(plain, rows.values.shape[1], spec, tensor_scale), spec, tensor_scale)
