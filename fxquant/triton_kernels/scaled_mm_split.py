"""scaled_mm_split: codes times codes for few rows of x, where one tile a program would leave processors idle.

K is cut into SPLIT_K pieces. Each program writes the sums of a tile over one piece into a workspace, and a second
kernel adds the pieces up, always in the same order, and finishes as scaled_mm does: results don't change from run to
run, and those of int8 have scaled_mm's bits.

With so few rows the time is that of reading the weight, whatever multiplies. The tensor units do: that takes 0.2
instructions a byte (16 bytes a load, a quarter of an ldmatrix, a fraction of an mma), a product on the CUDA cores at
least two, so that there is no kernel for a single row.
"""

from __future__ import annotations

import torch
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
    why_not_scaled,
)
from fxquant.triton_kernels.scaled_tiles import splits_for

MOST_ROWS = 256
_SUM_M, _SUM_N = 4, 128  # the tile of a program that adds up


@triton.jit(do_not_specialize=["M"])  # one kernel for any number of rows
def _sums_over_pieces(
    x_ptr,
    w_ptr,
    sums_ptr,
    M,
    N,
    K,
    piece,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_W: tl.constexpr,
    X_DECODE: tl.constexpr,
    W_DECODE: tl.constexpr,
):
    """x_ptr [M, K] stride (stride_xm, 1), w_ptr [N, stride_wn]: codes as in `sums_of_products`. sums_ptr: int32 or
    float32 [pieces, M, N], contiguous. piece: length of a piece, a multiple of BLOCK_K. Program (tile along N, tile
    along M, piece)."""
    col, row, at = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M, tl.program_id(2)
    acc = sums_of_products(
        x_ptr, w_ptr, row, col, at * piece, tl.minimum(K, (at + 1) * piece), M, N, K, stride_xm, stride_wn,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_W, X_DECODE, W_DECODE,
    )  # fmt: skip
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    sums_ptr += tl.cast(at, tl.int64) * M * N
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(sums_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["M"])  # one kernel for any number of rows
def _finish_sums(
    sums_ptr,
    out_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    stride_xs,
    stride_rm,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """sums_ptr int32 or float32 [PIECES, M, N], contiguous; the rest as in `store_scaled`. Program (tile along M,
    tile along N)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = sums_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    acc = tl.load(at, mask=inside, other=0)
    for piece in tl.static_range(1, PIECES):  # pyright: ignore[reportGeneralTypeIssues]
        acc += tl.load(at + tl.cast(M, tl.int64) * N * piece, mask=inside, other=0)
    store_scaled(
        acc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, rows, cols, M, N, stride_xs, stride_rm,
        HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip


def _run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    meta = config.meta
    x, w, formats = codes_of(operands, meta.pop("DECODE"))
    m, n, k = x.shape[0], operands.out_features, operands.in_features
    out = output((m, n), operands.dtype, x.device)
    piece = triton.cdiv(triton.cdiv(k, meta["BLOCK_K"]), meta.pop("SPLIT_K")) * meta["BLOCK_K"]
    pieces = triton.cdiv(k, piece)
    sums = output((pieces, m, n), torch.int32 if x.dtype == torch.int8 else torch.float32, x.device)
    launch(
        _sums_over_pieces,
        (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), pieces),
        *(x, w, sums, m, n, k, piece, x.stride(0), w.stride(0)),
        EVEN_K=k % meta["BLOCK_K"] == 0,
        EVEN_W=w.shape[1] % meta["BLOCK_K"] == 0,
        **formats,
        **meta,
    )
    finish_sums(sums, out, operands)
    return out


def finish_sums(sums: Tensor, out: Tensor, operands: LinearOperands) -> None:
    """Adds up sums of products over pieces of K, int32 or float32 [pieces, M, N], and writes the result to `out`."""
    pieces, m, n = sums.shape
    x_scale, scale, stride_xs = scales_of(operands)
    (bias, residual, stride_rm), epilogue = epilogue_args(operands)
    launch(
        _finish_sums,
        (triton.cdiv(m, _SUM_M), triton.cdiv(n, _SUM_N)),  # the second one is 65535 at most
        *(sums, out, x_scale, scale, bias, residual, m, n, stride_xs, stride_rm),
        PIECES=pieces,
        BLOCK_M=_SUM_M,
        BLOCK_N=_SUM_N,
        **epilogue,
    )


def _why_not(problem: Problem, arch: Arch) -> str:
    if reason := why_not_scaled(problem):
        return reason
    if problem.m > MOST_ROWS:
        return f"{problem.m} rows fill the processors without cutting K; it takes {MOST_ROWS}"
    return "" if splits_for(problem, arch) else "tiles without a cut of K fill the processors, or K is too short to cut"


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    decode = decode_for(problem, arch)
    return tuple(
        SCALED_MM_SPLIT.config(tile.m, tile.n, tile.k, pieces, decode, tile.warps, tile.stages)
        for tile, pieces in splits_for(problem, arch)
    )


SCALED_MM_SPLIT = TritonKernel(
    name="scaled_mm_split",
    op="linear",
    fields=("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "DECODE", "num_warps", "num_stages"),
    why_not=_why_not,
    candidates=_candidates,
    run=_run,
    summary="8-bit codes × 8-bit codes for few rows: K cut into pieces, added up by a second kernel",
)
