"""Parts of coded integers (`fxquant.numerics.tiles`) as int8, in registers: what a dot product of codes reads.

A symmetric code of b < 8 bits comes as code * 2^(8 - b): its bits are put at the top of the byte, where the sign bit is
the byte's own, and no sign must be spread. Who sums divides by `inflation` at the end, which is exact. An affine one
comes as code - zero point; of 8 bits as code - 128.

Triton computes with bytes one by one; on NVIDIA's GPUs the four of a word are handled at once, in PTX (WORDS).
"""

# Triton unrolls and decides while it compiles, which a checker of Python's types can't follow.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.numerics.panels import plane_widths

widths_of = triton.constexpr_function(plane_widths)


def inflation(bits: int, affine: bool) -> int:
    """How many times its code an int8 out of `int8_part` is."""
    return 1 if affine else 2 ** (8 - bits)


@triton.constexpr_function
def plane(bits, index):
    """Width of a plane of a format, widest first; 0 if it has not so many."""
    widths = widths_of(bits)
    return widths[index] if index < len(widths) else 0


@triton.constexpr_function
def shift_of(bits, index, part, affine):
    """By how many bits to the left a part's bits in a plane's bytes go to their place."""
    width, below = widths_of(bits)[index], sum(widths_of(bits)[:index])
    return below + (0 if affine else 8 - bits) - width * (part % (8 // width))


@triton.constexpr_function
def mask_of(bits, index, affine):
    """The bits of a byte in which a plane's bits end up."""
    width, below = widths_of(bits)[index], sum(widths_of(bits)[:index])
    return (2**width - 1) << (below + (0 if affine else 8 - bits))


@triton.jit
def int8_part(
    low, middle, high, zero, BITS: tl.constexpr, PART: tl.constexpr, AFFINE: tl.constexpr, WORDS: tl.constexpr
):
    """One part of a chunk: int8 [rows, columns].

    low, middle, high  uint8 [rows, columns]: the stretch of each plane that the part lies in; anything where the format
                       has no such plane.
    zero               uint8 [rows, 1]: zero points of affine codes below 8 bits; else anything.
    """
    bits = low
    if BITS < 8:
        bits = _take(low, low, shift_of(BITS, 0, PART, AFFINE), mask_of(BITS, 0, AFFINE), True, WORDS)
        if plane(BITS, 1) > 0:
            bits = _take(middle, bits, shift_of(BITS, 1, PART, AFFINE), mask_of(BITS, 1, AFFINE), False, WORDS)
        if plane(BITS, 2) > 0:
            bits = _take(high, bits, shift_of(BITS, 2, PART, AFFINE), mask_of(BITS, 2, AFFINE), False, WORDS)
    if AFFINE and BITS < 8:
        bits = _less(bits, zero, WORDS)
    elif AFFINE or BITS < 8:
        bits = _turned(bits, WORDS)
    return bits.to(tl.int8, bitcast=True)


@triton.jit
def _take(stretch, taken, SHIFT: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, WORDS: tl.constexpr):
    """The bits of a plane, moved to their place, beside those `taken` before (none of FIRST)."""
    if WORDS:
        result = tl.inline_asm_elementwise(
            taking(SHIFT, MASK, FIRST),
            "=r,r,r",
            [stretch, taken],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        result = ((stretch << SHIFT) if SHIFT >= 0 else (stretch >> -SHIFT)) & MASK
        if not FIRST:
            result |= taken
    return result


@triton.jit
def _turned(bits, WORDS: tl.constexpr):
    """The top bit of each byte turned: an offset of half the range taken off, to two's complement."""
    if WORDS:
        result = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;",
            "=r,r",
            [bits],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        result = bits ^ 0x80
    return result


@triton.jit
def _less(bits, zero, WORDS: tl.constexpr):
    """bits - zero modulo 256; both are below 128, so with a byte's top bit set no borrow reaches the next one."""
    if WORDS:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; or.b32 t, $1, 0x80808080; sub.s32 t, t, $2; xor.b32 $0, t, 0x80808080; }",
            "=r,r,r",
            [bits, tl.broadcast_to(zero, bits.shape)],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        result = bits - zero
    return result


@triton.constexpr_function
def taking(shift, mask, first):
    """PTX of `_take`, four bytes at once."""
    mask = mask * 0x01010101
    move = f"shl.b32 t, $1, {shift};" if shift >= 0 else f"shr.b32 t, $1, {-shift};"
    end = f"and.b32 $0, t, {mask:#x};" if first else f"and.b32 t, t, {mask:#x}; or.b32 $0, t, $2;"
    return f"{{ .reg .b32 t; {move} {end} }}"
