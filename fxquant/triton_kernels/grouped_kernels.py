"""The Triton function of `grouped_mm` for integers: sums of products of codes by groups along K.

A tile is computed transposed, [BLOCK_N, BLOCK_M]: the weight is the left operand, which Hopper's and Blackwell's matrix
units take from registers, where codes are widened; and few rows of x are the narrow side of an instruction.
"""

# Triton unrolls and decides while it compiles, which a checker of Python's types can't follow.
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportRedeclaration=false

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.triton_kernels.epilogue import finish
from fxquant.triton_kernels.integer_parts import int8_part, plane, widths_of

# As int32 and float32 the same number apart: an int32 sum below 2**22 added to its pattern is that float plus the sum.
# So sums become floats by one subtraction, where a conversion has half or a quarter of its throughput.
_BIAS_BITS = tl.constexpr(0x4B400000)
_BIAS = tl.constexpr(12582912.0)


@triton.constexpr_function
def parts_in(bits):
    """Parts of a chunk of the tiles; of 8 bits each part is a chunk."""
    return 8 // widths_of(bits)[-1]


@triton.constexpr_function
def begins_stretch(bits, part, index):
    """A part is the first of those in its stretch of that plane."""
    widths = widths_of(bits)
    return index < len(widths) and part % parts_in(bits) % (8 // widths[index]) == 0


@triton.constexpr_function
def stretch_at(bits, width, part, index):
    """Where in a step's bytes of a row the stretch of that plane begins that a part lies in."""
    parts, widths = parts_in(bits), widths_of(bits)
    stretches = sum(parts * w // 8 for w in widths[:index]) + part % parts * widths[index] // 8
    return (part // parts * (parts * bits // 8) + stretches) * width


@triton.constexpr_function
def begins_granule(column, group, halves):
    """A dot at that column of a step is the first of its granule in the step. (Halves are granules of their own.)"""
    return group > 0 and (halves > 1 or column % group == 0 or column == 0)


@triton.constexpr_function
def ends_granule(column, width, group, step, halves):
    """... or the last."""
    return group > 0 and (halves > 1 or (column + width) % min(group, step) == 0)


@triton.constexpr_function
def dots_of(width, group):
    """How many granules the columns of one dot belong to: each takes a dot with x of the others masked."""
    return width // group if 0 < group < width else 1


@triton.constexpr_function
def granule_after(column, inner, part, width, group, step):
    """Which of a step's granules is summed up after the one of that column; second halves of parts come last."""
    if group > step:
        return 0
    count, dots = step // part, dots_of(width, group)
    order = [
        (nth * part + half * width) // group + at
        for half in range(part // width)
        for nth in range(count)
        for at in range(dots)
    ]
    mine = column // group + inner
    last = max(place for place, granule in enumerate(order) if granule == mine)
    return order[last + 1] if last + 1 < len(order) else step // group


@triton.jit
def grouped_products(
    x_ptr,
    tiles_ptr,
    scale_ptr,
    zero_ptr,
    x_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    granules,
    stride_xm,
    row_bytes,
    stride_xs,
    stride_rm,
    all_steps,
    steps,
    factor,
    BITS: tl.constexpr,
    AFFINE: tl.constexpr,
    GROUP: tl.constexpr,
    X_SCALE: tl.constexpr,
    WORDS: tl.constexpr,
    BIASED: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    MASK_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [M, N], or with SPLIT_K above 1 what each program along axis 1 of the grid sums up.

    x_ptr         int8 [M, K], stride (stride_xm, 1).
    tiles_ptr     uint8 [N, row_bytes], the layout of `fxquant.numerics.tiles`.
    scale_ptr     float32 or bfloat16 [granules, N]; zero_ptr uint8 [granules, N] (AFFINE).
    x_scale_ptr   [M] (X_SCALE 'row'), [1] ('one'), or [M, granules], stride (stride_xs, 1) ('group').
    bias_ptr, residual_ptr, stride_rm  as `finish` takes them.
    out_ptr       [M, N] of any float dtype; with SPLIT_K [SPLIT_K, M, N], float32, or int32 if GROUP is 0.
    steps         of STEP columns, which a program takes of all_steps. factor: float32, what sums are multiplied with.
    GROUP         columns of a granule, 0: all of K. PART, WIDTH: columns of a part of the tiles, of one dot.
    BIASED        sums of a step stay below 2**22, and become floats by a subtraction.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * tiles_n
    first_m = pid // in_group * GROUP_M
    group_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    rows = (first_m + pid % in_group % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % in_group // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows, w_rows = tl.minimum(rows, M - 1).to(tl.int64), tl.minimum(cols, N - 1)
    begin = split * steps

    k = tl.arange(0, WIDTH)
    x_ptrs = x_ptr + x_rows[None, :] * stride_xm + begin * STEP + k[:, None]
    t_ptrs = tiles_ptr + w_rows.to(tl.int64)[:, None] * row_bytes + begin * (STEP * BITS // 8) + k[None, :]
    STEP_GRANULES: tl.constexpr = STEP // GROUP if GROUP > 0 else 0  # 0 too if a granule takes several steps
    GRANULE_STEPS: tl.constexpr = GROUP // STEP if GROUP > STEP else 1
    granule = begin // GRANULE_STEPS if GROUP > STEP else begin * STEP_GRANULES
    granule = tl.minimum(granule, granules - 1)  # a program may have no steps
    s_ptrs = scale_ptr + tl.cast(granule, tl.int64) * N + w_rows
    z_ptrs = zero_ptr + tl.cast(granule, tl.int64) * N + w_rows
    xs_ptrs = x_scale_ptr + x_rows * stride_xs + granule
    turn = 0

    SUMS: tl.constexpr = AFFINE and BITS == 8
    HALVES: tl.constexpr = PART // WIDTH
    zero = tl.zeros([BLOCK_N], tl.uint8)
    sums = tl.zeros([BLOCK_M], tl.int32)
    total = tl.full([BLOCK_N, BLOCK_M], _BIAS_BITS if BIASED else 0, tl.int32)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # Scales are loaded a granule ahead: nothing waits for them then.
    next_s, next_zero, next_xs = tl.load(s_ptrs), zero, x_rows.to(tl.float32)
    if AFFINE:
        next_zero = tl.load(z_ptrs)
        zero = next_zero
    if X_SCALE == "group":
        next_xs = tl.load(xs_ptrs).to(tl.float32)

    for step in range(0, tl.minimum(steps, all_steps - begin)):
        later = 0  # 1 in the last step of a granule that takes several
        if GROUP > STEP:
            turn += 1
            later = (turn == GRANULE_STEPS).to(tl.int32)
            turn -= later * GRANULE_STEPS
        left = K - (begin + step) * STEP
        bytes_left = row_bytes - (begin + step) * (STEP * BITS // 8)
        for half in tl.static_range(HALVES):
            for part in tl.static_range(STEP // PART):
                if begins_stretch(BITS, part, 0):
                    at = stretch_at(BITS, PART, part, 0) + half * WIDTH
                    if MASK_TILES:
                        low = tl.load(t_ptrs + at, mask=k[None, :] < bytes_left - at, other=0)
                    else:
                        low = tl.load(t_ptrs + at)
                    if plane(BITS, 1) == 0:
                        middle = low
                    if plane(BITS, 2) == 0:
                        high = low
                if begins_stretch(BITS, part, 1):
                    middle = tl.load(t_ptrs + (stretch_at(BITS, PART, part, 1) + half * WIDTH))
                if begins_stretch(BITS, part, 2):
                    high = tl.load(t_ptrs + (stretch_at(BITS, PART, part, 2) + half * WIDTH))
                if EVEN_K:
                    x = tl.load(x_ptrs + (part * PART + half * WIDTH))
                else:
                    inside = k[:, None] < left - (part * PART + half * WIDTH)
                    x = tl.load(x_ptrs + (part * PART + half * WIDTH), mask=inside, other=0)

                for inner in tl.static_range(dots_of(WIDTH, GROUP)):
                    if begins_granule(part * PART + half * WIDTH, GROUP, HALVES):
                        s, zero, xs = next_s.to(tl.float32), next_zero, next_xs
                        nth = granule_after(part * PART + half * WIDTH, inner, PART, WIDTH, GROUP, STEP) + later
                        # The last one's are read once more, also for the columns behind the last, whose sums are 0.
                        nth = tl.minimum(nth, granules - 1 - granule)
                        next_s = tl.load(s_ptrs + nth * N)
                        if AFFINE:
                            next_zero = tl.load(z_ptrs + nth * N)
                        if X_SCALE == "group":
                            next_xs = tl.load(xs_ptrs + nth).to(tl.float32)
                        total = tl.full([BLOCK_N, BLOCK_M], _BIAS_BITS if BIASED else 0, tl.int32)
                        sums = tl.zeros([BLOCK_M], tl.int32)
                    mine = x
                    if dots_of(WIDTH, GROUP) > 1:
                        mine = tl.where((k >= inner * GROUP)[:, None] & (k < (inner + 1) * GROUP)[:, None], x, 0)
                    w = int8_part(low, middle, high, zero[:, None], BITS, part % parts_in(BITS), AFFINE, WORDS)
                    total = tl.dot(w, mine, acc=total, out_dtype=tl.int32)
                    if SUMS:
                        sums += tl.sum(mine.to(tl.int32), 0)
                    if ends_granule(part * PART + half * WIDTH, WIDTH, GROUP, STEP, HALVES):
                        if SUMS:
                            total -= (zero.to(tl.int32) - 128)[:, None] * sums[None, :]
                        of_granule = total.to(tl.float32, bitcast=BIASED)
                        if BIASED:
                            of_granule -= _BIAS
                        if X_SCALE == "group":
                            of_granule *= xs[None, :]
                        acc += of_granule * s[:, None]
        x_ptrs += STEP
        t_ptrs += STEP * BITS // 8
        if GROUP > 0:
            passed = later if GROUP > STEP else STEP_GRANULES
            granule += passed
            s_ptrs += passed * N
            z_ptrs += passed * N
            xs_ptrs += passed

    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if GROUP == 0:
        if SUMS:
            total -= (zero.to(tl.int32) - 128)[:, None] * sums[None, :]
        acc = total.to(tl.float32)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    if SPLIT_K > 1:
        out_ptrs += tl.cast(split, tl.int64) * M * N
        if GROUP == 0:
            tl.store(out_ptrs, tl.trans(total), mask=inside)
        else:
            tl.store(out_ptrs, tl.trans(acc), mask=inside)
    else:
        y = tl.trans(acc)
        if GROUP == 0:
            y *= next_s.to(tl.float32)[None, :]
        if X_SCALE == "row":
            y *= tl.load(x_scale_ptr + x_rows).to(tl.float32)[:, None]
        elif X_SCALE == "one":
            y *= tl.load(x_scale_ptr).to(tl.float32)
        y = finish(y * factor, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)
