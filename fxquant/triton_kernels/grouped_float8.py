"""The Triton function of `grouped_mm` for float8: sums of products by groups along K, where both sides may have scales.

One side is the left operand of the dot, the other the right one. x is the left one, unless it has fewer rows than an
instruction of Hopper or Blackwell: then the weight is, and the tile is computed transposed.
"""

# Triton unrolls and decides while it compiles, which a checker of Python's types can't follow.
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportRedeclaration=false

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.triton_kernels.epilogue import finish

NATIVE, HALF, FNUZ = 0, 1, 2  # how float8 is multiplied: as it is, decoded to float16, as gfx942's kind of float8
_HALF, _FNUZ = tl.constexpr(HALF), tl.constexpr(FNUZ)


@triton.jit
def float8_operand(codes, E5M2: tl.constexpr, FLOAT8: tl.constexpr, WORDS: tl.constexpr):
    """Codes of float8 (of HALF and FNUZ as uint8) as an operand of a dot; the launcher gives the factor of its sums.

    Of HALF, e4m3fn's exponent and mantissa are put into float16's, whose exponent is biased by 8 more.
    """
    if FLOAT8 == _HALF and WORDS:
        operand = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            prmt.b32 $0, $2, 0, 0x1404;
            prmt.b32 $1, $2, 0, 0x3424;
            }"""
            if E5M2
            else """{
            .reg .b32 t, u, s, v;
            prmt.b32 t, $2, 0, 0x1404;
            prmt.b32 u, $2, 0, 0x3424;
            shr.b32 s, t, 1;
            shr.b32 v, u, 1;
            and.b32 t, t, 0x80008000;
            and.b32 u, u, 0x80008000;
            and.b32 s, s, 0x3f803f80;
            and.b32 v, v, 0x3f803f80;
            or.b32 $0, t, s;
            or.b32 $1, u, v;
            }""",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    elif FLOAT8 == _HALF:
        high = codes.to(tl.int16) << 8
        if not E5M2:
            high = (high & -0x8000) | ((high >> 1) & 0x3F80)
        operand = high.to(tl.float16, bitcast=True)
    elif FLOAT8 == _FNUZ:
        plain = tl.where(codes == 0x80, 0, codes).to(tl.uint8)  # of that kind, -0 is NaN
        operand = plain.to(tl.float8e5b16 if E5M2 else tl.float8e4b8, bitcast=True)
    else:
        operand = codes
    return operand


@triton.jit
def float8_products(
    left_ptr,
    right_ptr,
    left_scale_ptr,
    right_scale_ptr,
    x_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    granules,
    stride_left,
    stride_right,
    stride_ls,
    stride_lg,
    stride_rs,
    stride_rg,
    stride_rm,
    all_steps,
    steps,
    factor,
    GROUP: tl.constexpr,
    LEFT_E5M2: tl.constexpr,
    RIGHT_E5M2: tl.constexpr,
    LEFT_SCALED: tl.constexpr,
    RIGHT_SCALED: tl.constexpr,
    X_SCALE: tl.constexpr,
    X_LEFT: tl.constexpr,
    FLOAT8: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [M, N], or with SPLIT_K above 1 float32 [SPLIT_K, M, N]: what each program along axis 1 of the grid sums up.

    left_ptr, right_ptr  float8 codes, of HALF and FNUZ as uint8: x [M, K], stride (stride_left, 1), and the tiles
                         [N, bytes], stride (stride_right, 1), of X_LEFT; else the tiles and x.
    left_scale_ptr, right_scale_ptr  float32 or bfloat16, of each row (strides stride_ls, stride_rs) and granule
                         (stride_lg, stride_rg) of a side that is scaled by granules: LEFT_SCALED, RIGHT_SCALED 'row',
                         or 'one' where all rows of a tile have the same; else 'no'.
    x_scale_ptr          [M] (X_SCALE 'row') or [1] ('one'); not read where x is scaled by granules ('group').
    bias_ptr, residual_ptr, stride_rm  as `finish` takes them. out_ptr: of any float dtype.
    steps                of STEP columns, which a program takes of all_steps. factor: float32, of all sums.
    GROUP, WIDTH         columns of a granule, of one dot.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * tiles_n
    first_m = pid // in_group * GROUP_M
    group_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    rows = (first_m + pid % in_group % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % in_group // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)
    if X_LEFT:
        left, right = tl.minimum(rows, M - 1).to(tl.int64), tl.minimum(cols, N - 1).to(tl.int64)
        shape: tl.constexpr = (BLOCK_M, BLOCK_N)
    else:
        left, right = tl.minimum(cols, N - 1).to(tl.int64), tl.minimum(rows, M - 1).to(tl.int64)
        shape: tl.constexpr = (BLOCK_N, BLOCK_M)

    begin = split * steps
    k = tl.arange(0, WIDTH)
    left_ptrs = left_ptr + left[:, None] * stride_left + begin * STEP + k[None, :]
    right_ptrs = right_ptr + right[None, :] * stride_right + begin * STEP + k[:, None]
    STEP_GRANULES: tl.constexpr = STEP // GROUP  # 0 if a granule takes several steps
    GRANULE_STEPS: tl.constexpr = GROUP // STEP if GROUP > STEP else 1
    granule = tl.minimum(begin * STEP_GRANULES if STEP >= GROUP else begin // GRANULE_STEPS, granules - 1)
    # Addresses of scales are many in a thread of Hopper's: one of 64 bits, the others as distances of 32.
    l_scale = left_scale_ptr + tl.cast(granule, tl.int64) * stride_lg
    r_scale = right_scale_ptr + tl.cast(granule, tl.int64) * stride_rg
    l_at = (tl.min(left) if LEFT_SCALED == "one" else left).to(tl.int32) * stride_ls
    r_at = (tl.min(right) if RIGHT_SCALED == "one" else right).to(tl.int32) * stride_rs
    turn = 0
    total = tl.zeros(shape, tl.float32)
    acc = tl.zeros(shape, tl.float32)
    # Scales are loaded a granule ahead: nothing waits for them then.
    next_ls, next_rs = 1.0, 1.0
    if LEFT_SCALED != "no":
        next_ls = tl.load(l_scale + l_at).to(tl.float32)
    if RIGHT_SCALED != "no":
        next_rs = tl.load(r_scale + r_at).to(tl.float32)

    for step in range(0, tl.minimum(steps, all_steps - begin)):
        after = 1
        if GROUP > STEP:
            turn += 1
            after = (turn == GRANULE_STEPS).to(tl.int32)
            turn -= after * GRANULE_STEPS
        at = (begin + step) * STEP
        for dot in tl.static_range(STEP // WIDTH):
            if EVEN_K:
                lhs = tl.load(left_ptrs + dot * WIDTH)
                rhs = tl.load(right_ptrs + dot * WIDTH)
            else:
                lhs = tl.load(left_ptrs + dot * WIDTH, mask=k[None, :] < K - at - dot * WIDTH, other=0.0)
                rhs = tl.load(right_ptrs + dot * WIDTH, mask=k[:, None] < K - at - dot * WIDTH, other=0.0)
            rhs = float8_operand(rhs, RIGHT_E5M2, FLOAT8, WORDS)
            for inner in tl.static_range(WIDTH // GROUP if WIDTH > GROUP else 1):
                if dot == 0 or dot * WIDTH % GROUP == 0:
                    ls, rs = next_ls, next_rs
                    nth = (dot * WIDTH // GROUP if STEP >= GROUP else 0) + inner + after
                    nth = tl.minimum(nth, granules - 1 - granule)
                    if LEFT_SCALED != "no":
                        next_ls = tl.load(l_scale + nth * stride_lg + l_at).to(tl.float32)
                    if RIGHT_SCALED != "no":
                        next_rs = tl.load(r_scale + nth * stride_rg + r_at).to(tl.float32)
                    total = tl.zeros(shape, tl.float32)
                mine = lhs
                if WIDTH > GROUP:  # codes of the other granules masked
                    here = (k >= inner * GROUP)[None, :] & (k < (inner + 1) * GROUP)[None, :]
                    mine = tl.where(here, lhs.to(tl.uint8, bitcast=True), 0).to(lhs.dtype, bitcast=True)
                total = tl.dot(float8_operand(mine, LEFT_E5M2, FLOAT8, WORDS), rhs, acc=total)
                if (dot + 1) * WIDTH % (GROUP if GROUP < STEP else STEP) == 0 or WIDTH > GROUP:
                    if RIGHT_SCALED == "row":
                        total *= rs[None, :]
                    elif RIGHT_SCALED == "one" and LEFT_SCALED == "row":
                        ls *= rs
                    elif RIGHT_SCALED == "one":
                        total *= rs
                    if LEFT_SCALED == "row":
                        total *= ls[:, None]
                    elif LEFT_SCALED == "one":
                        total *= ls
                    acc += total
        left_ptrs += STEP
        right_ptrs += STEP
        passed = after if GROUP > STEP else STEP_GRANULES
        granule += passed
        l_scale += passed * stride_lg
        r_scale += passed * stride_rg

    y = acc if X_LEFT else tl.trans(acc)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    if SPLIT_K > 1:
        tl.store(out_ptrs + tl.cast(split, tl.int64) * M * N, y, mask=inside)
    else:
        if X_SCALE == "row":
            y *= tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        elif X_SCALE == "one":
            y *= tl.load(x_scale_ptr).to(tl.float32)
        y = finish(y * factor, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)
