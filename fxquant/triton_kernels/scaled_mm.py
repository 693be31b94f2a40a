"""scaled_mm: codes times codes with a scale a row of x and a scale a column, a tile of the result a program.

For int8 × int8 and float8 × float8 (e4m3fn, e5m2) of any M, N and K. Where a target multiplies no float8 of the OCP
kind (sm80; gfx942 has the fnuz kind), codes are widened to float16 in registers, which is exact: field DECODE.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import launch, output
from fxquant.triton_kernels.operands import LinearOperands
from fxquant.triton_kernels.scaled_products import (
    codes_of,
    decode_for,
    epilogue_args,
    scales_of,
    store_scaled,
    sums_of_products,
    tile_of,
    why_not_scaled,
)
from fxquant.triton_kernels.scaled_tiles import tiles_for


@triton.jit(do_not_specialize=["M"])  # one kernel for any number of rows
def _scaled_mm(
    x_ptr,
    w_ptr,
    out_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_xs,
    stride_rm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_W: tl.constexpr,
    X_DECODE: tl.constexpr,
    W_DECODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """x_ptr [M, K] stride (stride_xm, 1), w_ptr [N, stride_wn]: codes as in `sums_of_products`; the rest as in
    `store_scaled`. One program a tile."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = sums_of_products(
        x_ptr, w_ptr, row, col, 0, K, M, N, K, stride_xm, stride_wn,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_W, X_DECODE, W_DECODE,
    )  # fmt: skip
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    store_scaled(
        acc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, rows, cols, M, N, stride_xs, stride_rm,
        HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip


def _run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    meta = config.meta
    x, w, formats = codes_of(operands, meta.pop("DECODE"))
    m, n, k = x.shape[0], operands.out_features, operands.in_features
    x_scale, scale, stride_xs = scales_of(operands)
    (bias, residual, stride_rm), epilogue = epilogue_args(operands)
    out = output((m, n), operands.dtype, x.device)
    launch(
        _scaled_mm,
        (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),),
        *(x, w, out, x_scale, scale, bias, residual),
        *(m, n, k, x.stride(0), w.stride(0), stride_xs, stride_rm),
        EVEN_K=k % meta["BLOCK_K"] == 0,
        EVEN_W=w.shape[1] % meta["BLOCK_K"] == 0,
        **formats,
        **meta,
        **epilogue,
    )
    return out


def _why_not(problem: Problem, arch: Arch) -> str:
    return why_not_scaled(problem)


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    decode = decode_for(problem, arch)
    return tuple(
        SCALED_MM.config(tile.m, tile.n, tile.k, 8, decode, tile.warps, tile.stages)
        for tile in tiles_for(problem, arch)
    )


SCALED_MM = TritonKernel(
    name="scaled_mm",
    op="linear",
    fields=("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "DECODE", "num_warps", "num_stages"),
    why_not=_why_not,
    candidates=_candidates,
    run=_run,
    summary="8-bit codes × 8-bit codes, one scale a row and a column",
)
