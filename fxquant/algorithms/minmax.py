"""minmax: the smallest and the largest value of a granule land on the first and the last code."""

from __future__ import annotations

from torch import Tensor

from fxquant.algorithms.ranges import codes_of, plain_range
from fxquant.numerics import Codes
from fxquant.spec import TensorSpec


def minmax(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x, of any float dtype, to unsigned integers.

    The spec is affine (an integer zero point; the range is widened to hold 0) or shift.
    """
    return codes_of(x, plain_range(x, spec), spec)
