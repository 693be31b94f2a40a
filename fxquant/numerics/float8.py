"""float8 codes, e4m3fn and e5m2: OCP 8-bit floating point, rounded to nearest even, saturating."""

from __future__ import annotations

from torch import Tensor

from fxquant.numerics.codes import Codes, no_zero_point
from fxquant.numerics.granules import scale_and_factor, scaled
from fxquant.spec import TensorSpec


def encode_float8(x: Tensor, amax: Tensor, spec: TensorSpec) -> Codes:
    """Codes of x in a float8 dtype; the absolute range `amax` of a granule lands on the largest finite code.

    x: any float dtype, widened to float32. amax: float32, in the shape of the scales. Values beyond it saturate: they
    never become infinity or NaN.
    """
    scale, factor = scale_and_factor(amax, spec.qmax)
    codes = scaled(x, factor, spec.granularity).clamp_(spec.qmin, spec.qmax)
    return Codes(codes.to(spec.code_dtype).contiguous(), scale, no_zero_point(scale))
