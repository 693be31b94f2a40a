"""Integer codes: symmetric around 0, or affine with an integer zero point.

code = rint(x * factor) with half to even, factor = steps / range rounded once in float32. A granule without usable
range has codes 0 (affine: codes 0 and zero point 0), and scale 0 or, if it holds NaN or infinity, NaN. Where the group
does not divide K, the last group of a row is shorter: ceil(K / group) scales a row, and codes are never padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.codes import Codes, no_zero_point
from fxquant.numerics.granules import combine, scale_and_factor, scaled
from fxquant.spec import TensorSpec


def encode_symmetric(x: Tensor, amax: Tensor, spec: TensorSpec) -> Codes:
    """Codes of x, qmin..qmax (int8: -127..127, int4: -7..7), stored in int8; `amax` is each granule's absolute range.

    x: any float dtype, widened to float32. amax: float32, in the shape of the scales; values beyond it saturate.
    """
    scale, factor = scale_and_factor(amax, spec.qmax)
    codes = scaled(x, factor, spec.granularity).round_().clamp_(spec.qmin, spec.qmax)
    return Codes(codes.to(spec.code_dtype).contiguous(), scale, no_zero_point(scale))


def encode_affine(x: Tensor, low: Tensor, high: Tensor, spec: TensorSpec) -> Codes:
    """Codes of x, 0..qmax (int8: 255, int4: 15), stored in uint8; granules range from `low` <= 0 to `high` >= 0.

    x: any float dtype, widened to float32. low, high: float32, in the shape of the scales. The zero point is the code
    of 0, exactly. A granule whose high - low overflows float32 counts as not finite.
    """
    scale, factor = scale_and_factor(high - low, spec.qmax)
    zero = torch.where(factor != 0, -low * factor, 0.0).round_().clamp(0, spec.qmax)
    codes = combine(Tensor.add_, scaled(x, factor, spec.granularity).round_(), zero, spec.granularity)
    codes = codes.clamp_(0, spec.qmax)
    return Codes(codes.to(spec.code_dtype).contiguous(), scale, zero.to(torch.uint8))
