"""Codes of a weight out of the layout of `fxquant.numerics.tiles`, widened in registers to a float type, exactly.

An integer pattern u is or-ed into the mantissa of a power of two whose unit in the last place is 1 (1024 in float16,
2**23 in float32): the float is then 2**p + u, and one subtraction takes off 2**p and the zero point. The trick is known
from FasterTransformer's interleaved converters. A small float is shifted so that its exponent and mantissa stand at the
places of the wider type's, which gives the value times 2**(its bias - the wider bias), subnormals too; one
multiplication by a power of two puts that right. bfloat16 is cut out of float32: its 7 mantissa bits hold every code.

That is shifts, masks and float32 or float16 arithmetic, the same on every GPU and in the interpreter, so float8 of both
kinds (fn and fnuz) decodes alike on sm80 and on gfx942. Only float8_e4m3fn may be left to the target's own instruction.
"""

# Triton reads the jit functions, not Python: a constexpr is a plain value there, and tensors take any index.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fxquant.numerics.tiles import tile_flip
from fxquant.spec import TensorSpec

_FP16_EXPONENTS = 4  # what fits float16 exactly, subnormals and all, without a detour; 5 where the bias is 15
_NAN_CODES = {"float8_e4m3fn": "all_ones", "float8_e4m3fnuz": "minus_zero", "float8_e5m2fnuz": "minus_zero"}


def format_meta(spec: TensorSpec) -> dict[str, Any]:
    """The constexprs of a format that the functions below take, as keywords of `launch`.

    BITS of a code; EXPONENT and MANTISSA bits of a float, 0 of an integer; BIAS of a float; CENTRE of a symmetric
    integer: what its pattern is larger by than its code; FLIP: what to xor a pattern with before that; NANS: which
    patterns are NaN: '', 'all_ones', 'minus_zero', or 'ieee' (infinities too).
    """
    form = spec.format
    integer = form.kind == "int"
    bias, nans = form.bias, ""
    if not integer and not form.is_small_float:
        bias = form.bias + (1 if form.name.endswith("fnuz") else 0)
        nans = _NAN_CODES.get(form.name, "ieee")
    whole = integer and form.bits == 8 and not spec.has_zero_point
    return {
        "BITS": form.bits,
        "EXPONENT": form.exponent_bits,
        "MANTISSA": form.mantissa_bits,
        "BIAS": 0 if integer else bias,
        "CENTRE": 128 if whole else tile_flip(spec),
        "FLIP": 128 if whole else 0,
        "NANS": nans,
    }


def fits_float16(spec: TensorSpec) -> bool:
    """True if float16 holds the value of every code (under scale 1) exactly."""
    form = spec.format
    return form.kind == "int" or form.exponent_bits <= _FP16_EXPONENTS or not form.is_small_float


@triton.jit
def load_patterns(tiles, row, byte, mask, COLUMN: tl.constexpr, BITS: tl.constexpr, BY: tl.constexpr):
    """Patterns of the columns COLUMN, ... of a chunk, uint32 [rows, columns].

    Of a format with one plane, the stretch as it was loaded: the pattern is not at bit 0 in all parts, and there are
    other codes beside it: `widen` sees to both. Else the pattern alone. The columns must not leave the part of COLUMN.

    BY    'pointers' or 'masked': tiles are pointers to uint8 [rows, columns], the first stretch of the chunk of each
          row, plus the column within it; where mask is false they are not read. 'descriptor': tiles describe uint8
          [N, bytes] in blocks [rows, columns]; row is the first row, byte where the chunk begins.
    """
    patterns = _add_plane(None, tiles, row, byte, mask, COLUMN, BITS, 8, BY)
    patterns = _add_plane(patterns, tiles, row, byte, mask, COLUMN, BITS, 4, BY)
    patterns = _add_plane(patterns, tiles, row, byte, mask, COLUMN, BITS, 2, BY)
    return _add_plane(patterns, tiles, row, byte, mask, COLUMN, BITS, 1, BY)


@triton.jit
def _add_plane(
    patterns, tiles, row, byte, mask, COLUMN: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr, BY: tl.constexpr
):
    """`patterns` with the bits that the plane of that width holds; as it is if the format has no such plane."""
    WIDTH: tl.constexpr = 32 if BITS % 2 == 1 else 64
    PARTS: tl.constexpr = 8 // (BITS & -BITS)
    SLOTS: tl.constexpr = 8 // PLANE
    BELOW: tl.constexpr = BITS & ~(2 * PLANE - 1)  # bits of the wider planes, which hold the lower bits
    PART: tl.constexpr = COLUMN // WIDTH
    if (BITS & PLANE) != 0:
        AT: tl.constexpr = (PARTS * BELOW // 8 + PART // SLOTS) * WIDTH + COLUMN % WIDTH
        if BY == "descriptor":
            stretch = tiles.load([row, byte + AT])
        elif BY == "masked":
            stretch = tl.load(tiles + AT, mask=mask, other=0)
        else:
            stretch = tl.load(tiles + AT)
        # 32 bits wide, so that a mask and an or become one instruction.
        bits = stretch.to(tl.uint32)
        SHIFT: tl.constexpr = PLANE * (PART % SLOTS)
        if BITS == PLANE:
            patterns = bits
        elif BELOW == 0:
            patterns = (bits >> SHIFT) & (2**PLANE - 1)
        elif SHIFT > BELOW:
            patterns = patterns | ((bits >> (SHIFT - BELOW)) & ((2**PLANE - 1) << BELOW))
        else:
            patterns = patterns | ((bits << (BELOW - SHIFT)) & ((2**PLANE - 1) << BELOW))
    return patterns


@triton.jit
def widen(
    patterns,
    zero,
    OUT: tl.constexpr,
    COLUMN: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRE: tl.constexpr,
    FLIP: tl.constexpr,
    NANS: tl.constexpr,
    BY_UNIT: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """The values of patterns under scale 1, less the zero point where AFFINE, exactly, in OUT.

    patterns  uint32 of any shape, as `load_patterns` gives them for the columns from COLUMN on.
    zero      uint8 that can be broadcast to it; anything where not AFFINE.
    OUT       float32; bfloat16; or float16, for formats that fit it (`fits_float16`).
    BY_UNIT   the target has an instruction for float8_e4m3fn (sm89 and later); of other formats it changes nothing.
    """
    NATIVE: tl.constexpr = BY_UNIT and NANS == "all_ones"
    SHIFT: tl.constexpr = BITS * (COLUMN // 64 % (8 // BITS)) if BITS == (BITS & -BITS) else 0
    if EXPONENT == 0:
        # A pattern is left where it is: the mantissa's bits from SHIFT on are units of a smaller power of two.
        MASK: tl.constexpr = (2**BITS - 1) << SHIFT
        if tl.float16 == OUT:
            value = (((patterns ^ FLIP) & MASK) | (0x6400 - (SHIFT << 10))).to(tl.uint16).to(tl.float16, bitcast=True)
            if AFFINE:
                biased = (zero.to(tl.uint16) << SHIFT) | (0x6400 - (SHIFT << 10))
                value = value - biased.to(tl.float16, bitcast=True)
            else:
                value = value - (2.0 ** (10 - SHIFT) + CENTRE)
        else:
            value = (((patterns ^ FLIP) & MASK) | (0x4B000000 - (SHIFT << 23))).to(tl.float32, bitcast=True)
            if AFFINE:
                biased = (zero.to(tl.uint32) << SHIFT) | (0x4B000000 - (SHIFT << 23))
                value = value - biased.to(tl.float32, bitcast=True)
            else:
                value = value - (2.0 ** (23 - SHIFT) + CENTRE)
    elif NATIVE:
        value = patterns.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif NANS == "ieee":  # float8_e5m2 is float16 cut short
        value = (patterns << 8).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        HALF: tl.constexpr = tl.float16 == OUT and EXPONENT <= 4
        TOP: tl.constexpr = 15 if HALF else 31
        DOWN: tl.constexpr = (5 if HALF else 8) - EXPONENT
        # The sign goes to the top, copies of it into the exponent's upper bits, where the mask takes them off again.
        signed = (patterns << (32 - BITS - SHIFT)).to(tl.int32, bitcast=True)
        placed = (signed >> (31 - TOP + DOWN)).to(tl.uint32, bitcast=True)
        bits = placed & ((1 << TOP) | ((2 ** (BITS - 1) - 1) << (TOP + 1 - BITS - DOWN)))
        if HALF:
            value = bits.to(tl.uint16).to(tl.float16, bitcast=True) * (2.0 ** (15 - BIAS))
        else:
            value = bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))
        value = _with_nans(value, patterns, NANS)
    if tl.bfloat16 == OUT and not NATIVE:
        wide = value.to(tl.float32).to(tl.uint32, bitcast=True)
        return (wide >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(OUT)


@triton.jit
def _with_nans(value, patterns, NANS: tl.constexpr):
    if NANS == "all_ones":
        value = tl.where((patterns & 0x7F) == 0x7F, float("nan"), value)
    elif NANS == "minus_zero":
        value = tl.where(patterns == 0x80, float("nan"), value)
    return value


@triton.jit
def scale_value(raw, SCALE: tl.constexpr):
    """Scales as they are stored -> float32, exactly. raw: float32, bfloat16; uint8 where SCALE is 'e8m0' or 'e4m3'."""
    if SCALE == "e8m0":
        value = (raw.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
        value = tl.where(raw == 0, 2.0**-127, value)
        return tl.where(raw == 255, float("nan"), value)
    if SCALE == "e4m3":
        return widen(raw.to(tl.uint32), 0, tl.float32, 0, 8, 4, 3, 7, 0, 0, "all_ones", False, False)
    return raw.to(tl.float32)
