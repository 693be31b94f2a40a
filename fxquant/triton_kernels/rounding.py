"""What kernels share that make codes: scales from ranges, and codes from values, bit-equal to `fxquant.numerics`.

Ranges are bit patterns of absolute values: as integers they have the order of the floats, with infinity above all
numbers and NaN above infinity, so that the largest is exact in any order and nothing that is not finite gets lost.
Codes of floats are made by integer arithmetic, since not every target has an instruction for every format, and none
rounds and saturates differently then.
"""

# pyright: reportArgumentType=false
# A number is a constexpr once it is passed to a jit function.

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.numerics import smallest_range
from fxquant.numerics.scales import SMALLEST_E4M3
from fxquant.spec import FLOAT8_E4M3FN, TensorSpec


def spec_constants(spec: TensorSpec) -> dict[str, int | float | str]:
    """The constexprs of `scales_of_ranges` and `codes_of_values` for a symmetric spec, by name."""
    number = spec.format
    fnuz = number.name.endswith("fnuz")
    span, headroom = number.qmax, 1.0
    if spec.has_tensor_scale:
        span, headroom = number.qmax * FLOAT8_E4M3FN.qmax, 1 / SMALLEST_E4M3
    return {
        "SCALE": spec.scale,
        "QMAX": float(number.qmax),
        "SMALLEST": smallest_range(span * headroom),
        "EMAX": number.largest_exponent,
        "MANTISSA": number.mantissa_bits if number.kind == "float" else -1,
        "BIAS": number.bias + fnuz,
        "BITS": number.bits,
        "FNUZ": fnuz,
    }


@triton.jit
def range_bits(values):
    """float32 values of any shape -> int32 patterns of their absolute values."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales_of_ranges(
    bits, tensor_scale, SCALE: tl.constexpr, QMAX: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr
):
    """Ranges as int32 patterns -> (the scale as it is stored, the float32 factor of values), in the same shape.

    float32 scales are stored as they are; bfloat16, e8m0 and e4m3 ones as their patterns, int16 or uint8. tensor_scale:
    float32, of e4m3 scales only.
    """
    # One return: the branches' results have several dtypes, and only one branch is compiled.
    amax = bits.to(tl.float32, bitcast=True)
    finite = bits < 0x7F800000
    one = tl.full(amax.shape, 1.0, tl.float32)
    if SCALE == "e8m0":
        exponent = tl.minimum(tl.maximum((bits >> 23) - EMAX, 0), 253)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        usable = finite & (bits > 0)
        stored = tl.where(finite, exponent, 255).to(tl.uint8)
    elif SCALE == "e4m3":
        usable = (tensor_scale > 0) & (bits > 0)
        under = tl.math.div_rn(tl.math.div_rn(amax, one * QMAX), tl.where(usable, tensor_scale, 1.0))
        under = tl.where(usable, tl.minimum(tl.maximum(under, 0.001953125), 448.0), 0.0)  # 2**-9 is the smallest e4m3
        stored = codes_of_values(under, 448.0, 3, 7, 8, False)
        code = stored.to(tl.int32)
        normal = ((code << 20) + 0x3C000000).to(tl.float32, bitcast=True)
        scale = tl.where(code >= 8, normal, code.to(tl.float32) * 0.001953125)
        factor = tl.math.div_rn(one, tl.where(usable, scale * tensor_scale, 1.0))
    else:
        usable = finite & (amax >= SMALLEST)
        divisor = tl.where(usable, amax, 1.0)
        scale = tl.where(usable, tl.math.div_rn(divisor, one * QMAX), 0.0)
        if SCALE == "float32":
            factor = tl.math.div_rn(one * QMAX, divisor)
            stored = tl.where(finite, scale, float("nan"))
        else:
            pattern = scale.to(tl.int32, bitcast=True)
            pattern = tl.minimum((pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16, 0x7F7F)
            kept = tl.where(usable, (pattern << 16).to(tl.float32, bitcast=True), 1.0)
            factor = tl.math.div_rn(one, kept)
            stored = tl.where(finite, pattern, 0x7FC0).to(tl.int16)
    return stored, tl.where(usable, factor, 0.0)


@triton.jit
def scale_of_tensor(bits, SPAN: tl.constexpr, SMALLEST: tl.constexpr):
    """The range of a whole tensor, int32 pattern -> the float32 scale that e4m3 scales stand under."""
    amax = bits.to(tl.float32, bitcast=True)
    usable = (bits < 0x7F800000) & (amax >= SMALLEST)
    scale = tl.math.div_rn(tl.where(usable, amax, 0.0), tl.full(amax.shape, SPAN, tl.float32))
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def codes_of_values(
    values, QMAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr, FNUZ: tl.constexpr
):
    """float32 values, multiplied by their factor -> codes, int8 if MANTISSA is -1, else uint8 patterns.

    Nearest with ties to even, saturating at QMAX; NaN is 0. MANTISSA, BIAS: of the float format; FNUZ: without -0.
    """
    values = tl.where(values == values, values, 0.0)
    values = tl.minimum(tl.maximum(values, -QMAX), QMAX)
    if MANTISSA < 0:
        # The unit in the last place of 1.5 * 2**23 is 1: the addition rounds to a whole number.
        codes = ((values + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    else:
        bits = values.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        SHIFT: tl.constexpr = 23 - MANTISSA
        # float32's pattern under the small bias, without its last mantissa bits; a carry goes into the exponent.
        normal = magnitude - ((127 - BIAS) << 23)
        normal = (normal + ((normal >> SHIFT) & 1) + (2 ** (SHIFT - 1) - 1)) >> SHIFT
        # Added to a float32 whose unit in the last place is the step of subnormals, a value is rounded to that step.
        BIG: tl.constexpr = (128 - BIAS + SHIFT) << 23
        big = tl.full(values.shape, BIG, tl.int32).to(tl.float32, bitcast=True)
        rounded = magnitude.to(tl.float32, bitcast=True) + big
        subnormal = rounded.to(tl.int32, bitcast=True) - BIG
        code = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
        signed = code | ((bits >> (32 - BITS)) & 2 ** (BITS - 1))
        codes = (tl.where(code == 0, 0, signed) if FNUZ else signed).to(tl.uint8)
    return codes
