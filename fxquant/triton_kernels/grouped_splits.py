"""The second pass of `grouped_mm` where K is split: sums of what the programs of one tile stored."""

# Triton unrolls and decides while it compiles, which a checker of Python's types can't follow.
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportRedeclaration=false

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.triton_kernels.epilogue import finish


@triton.jit
def sum_of_splits(
    parts_ptr,
    scale_ptr,
    x_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    stride_split,
    stride_rm,
    factor,
    WHOLE: tl.constexpr,
    X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [M, N] from what `grouped_products` stored, always in the same order.

    parts_ptr  [SPLIT_K, M, N]: float32, scaled by granules; or int32 (WHOLE), which scale_ptr [N] scales.
    stride_split is M * N. All else as `grouped_products` takes it.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    total = tl.load(parts_ptr + at, mask=inside, other=0)
    for _ in tl.static_range(SPLIT_K - 1):
        parts_ptr += stride_split
        total += tl.load(parts_ptr + at, mask=inside, other=0)
    y = total.to(tl.float32)
    if WHOLE:
        y *= tl.load(scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if X_SCALE == "row":
        y *= tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    elif X_SCALE == "one":
        y *= tl.load(x_scale_ptr).to(tl.float32)
    y = finish(y * factor, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
