"""absmax: the largest absolute value of a granule lands on the largest code."""

from __future__ import annotations

from torch import Tensor

from fxquant.numerics import Codes, absolute_range, encode_float8, encode_symmetric
from fxquant.spec import TensorSpec


def absmax(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x symmetrically, to integers or float8."""
    amax = absolute_range(x, spec.granularity)
    encode = encode_symmetric if spec.format.kind == "int" else encode_float8
    return encode(x, amax, spec)
