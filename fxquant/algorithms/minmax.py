"""minmax: the smallest and the largest value of a granule land on the first and the last code."""

from __future__ import annotations

from torch import Tensor

from fxquant.numerics import Codes, encode_affine, value_range
from fxquant.spec import TensorSpec


def minmax(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x to unsigned integers with an integer zero point."""
    low, high = value_range(x, spec.granularity)
    return encode_affine(x, low, high, spec)
