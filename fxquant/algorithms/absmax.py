"""absmax: the largest absolute value of a granule lands on the largest code."""

from __future__ import annotations

from torch import Tensor

from fxquant.algorithms.ranges import codes_of, plain_range
from fxquant.numerics import Codes
from fxquant.spec import TensorSpec


def absmax(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x, of any float dtype, to integers or floats; the spec is symmetric."""
    return codes_of(x, plain_range(x, spec), spec)
