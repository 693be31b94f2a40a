"""decoded_mm: float x times codes in any format for many rows of x: y = x @ decode(tiles).T, decoded once.

Every tile of coded_mm's result decodes its share of the weight anew, which for many rows of x costs more than the
product where decoding is dear: groups, odd widths, small floats. Here one kernel writes a slab of the weight out in the
half type (`decoded_weight`), and a second one multiplies it as a plain matrix; slab after slab, so that the room for it
is bounded. That moves 4 bytes a weight more, which some 600 rows of an H100's products outweigh.

Sums are float32. Codes under one scale a row are multiplied exactly and scaled after; others are rounded to the half
type with their scales: by a relative 2**-8 (bfloat16) or 2**-11 (float16) of a weight at most, or by 2**-25 where
float16 ends, as a weight is that was never quantized.
"""

# Triton reads the jit functions, not Python: a constexpr is a plain value there, and tensors take any index.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.coded_products import coded_pointers, epilogue_of, whole_scale, whole_scales
from fxquant.triton_kernels.coded_tiles import by_unit
from fxquant.triton_kernels.decode import scale_value
from fxquant.triton_kernels.decoded_tiles import least_rows, slab_rows, tiles_for
from fxquant.triton_kernels.decoded_weight import decode_rows, empty_slab, is_scaled, why_not_decoded
from fxquant.triton_kernels.epilogue import finish
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import ALIGNED, is_aligned, launch, output
from fxquant.triton_kernels.operands import LinearOperands
from fxquant.triton_kernels.scaled_products import tile_of

GROUP_M = 8
WIDE_TILE = tl.constexpr(256)  # columns of a tile that is finished in halves


@triton.jit
def _decoded_mm(
    x,
    slab,
    scale_ptr,
    whole_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    first,
    rows_end,
    M,
    N,
    K,
    stride_xm,
    stride_slab,
    stride_rm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """x half [M, K], stride (stride_xm, 1); slab half [rows_end - first, stride_slab], rows of the weight; pointers, or
    where TMA descriptors of blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]. scale_ptr [N], read unless SCALE is '';
    whole_ptr as in `whole_scale`; bias_ptr, residual_ptr as in `finish`. out_ptr [M, N], contiguous: columns first to
    rows_end are written. Programs make a tile each, or where PERSISTENT one after another."""
    height = rows_end - first
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(height, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _one_tile(
                tile, x, slab, scale_ptr, whole_ptr, bias_ptr, residual_ptr, out_ptr, first, rows_end, M, N, K,
                stride_xm, stride_slab, stride_rm, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, EVEN_K, SCALE, WHOLE,
                HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), x, slab, scale_ptr, whole_ptr, bias_ptr, residual_ptr, out_ptr, first, rows_end, M, N, K,
            stride_xm, stride_slab, stride_rm, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, EVEN_K, SCALE, WHOLE,
            HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _one_tile(
    tile,
    x,
    slab,
    scale_ptr,
    whole_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    first,
    rows_end,
    M,
    N,
    K,
    stride_xm,
    stride_slab,
    stride_rm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """That tile of the columns first to rows_end of the result."""
    tile_m, tile_n = tile_of(tile, M, rows_end - first, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ks = tl.arange(0, BLOCK_K)
    if not TMA:
        x_rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)
        w_rows = tl.minimum(tl.arange(0, BLOCK_N), rows_end - first - 1 - col)
        x_at = x + row.to(tl.int64) * stride_xm + (x_rows[:, None] * stride_xm + ks[None, :])
        w_at = slab + col.to(tl.int64) * stride_slab + (w_rows[:, None] * stride_slab + ks[None, :])
    for k in range(0, K, BLOCK_K):
        if TMA:
            a, b = x.load([row, k]), slab.load([col, k])
        else:
            a = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=(ks < K - k)[None, :], other=0.0)
            b = tl.load(w_at)
            x_at += BLOCK_K
            w_at += BLOCK_K
        acc = tl.dot(a, b.T, acc)
    rows, cols = row + tl.arange(0, BLOCK_M), first + col + tl.arange(0, BLOCK_N)
    if BLOCK_N < WIDE_TILE:
        _store(
            acc, scale_ptr, whole_ptr, bias_ptr, residual_ptr, out_ptr, rows, cols, rows_end, M, N, stride_rm,
            SCALE, WHOLE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:  # half of it after the other, in half as many registers
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        cols = first + col + tl.arange(0, HALF)
        _store(
            left, scale_ptr, whole_ptr, bias_ptr, residual_ptr, out_ptr, rows, cols, rows_end, M, N, stride_rm,
            SCALE, WHOLE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        _store(
            right, scale_ptr, whole_ptr, bias_ptr, residual_ptr, out_ptr, rows, cols + HALF, rows_end, M, N,
            stride_rm, SCALE, WHOLE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _store(
    acc,
    scale_ptr,
    whole_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    cols,
    rows_end,
    M,
    N,
    stride_rm,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Sums [rows, cols] scaled, finished and written to out_ptr [M, N], up to column rows_end."""
    if SCALE != "":
        acc *= scale_value(tl.load(scale_ptr + cols, mask=cols < rows_end, other=0), SCALE)[None, :]
    if WHOLE:
        acc *= whole_scale(whole_ptr, cols, rows_end, WHOLE)[None, :]
    y = finish(acc, bias_ptr, residual_ptr, rows, cols, M, rows_end, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    at = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < rows_end)[None, :])


def _run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    meta = config.meta
    unit, most, programs = meta.pop("BY_UNIT"), meta.pop("SLAB"), meta.pop("NUM_PROGRAMS")
    x = operands.x if operands.x.stride(-1) == 1 else operands.x.contiguous()
    m, n, k = x.shape[0], operands.out_features, operands.in_features
    spec = TensorSpec.parse(operands.spec)
    _, scale, _, whole = coded_pointers(operands)
    (bias, residual, stride_rm), epilogue = epilogue_of(operands)
    out = output((m, n), operands.dtype, x.device)
    if 0 in (m, n):
        return out
    if meta["TMA"] and not _described(x):
        x = x.contiguous()
        meta["TMA"] = int(_described(x))
    kept = "e8m0" if spec.scale == "e8m0" else "e4m3" if spec.scale == "e4m3" else "float"
    slab = empty_slab(min(most, n), operands)
    for first in range(0, n, most):
        rows = slab[: min(most, n - first)]
        decode_rows(rows, first, operands, unit)
        tiles = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(rows.shape[0], meta["BLOCK_N"])
        launch(
            _decoded_mm,
            (min(programs or tiles, tiles),),
            TensorDescriptor.from_tensor(x, [meta["BLOCK_M"], meta["BLOCK_K"]]) if meta["TMA"] else x,
            TensorDescriptor.from_tensor(rows, [meta["BLOCK_N"], meta["BLOCK_K"]]) if meta["TMA"] else rows,
            *(scale, whole, bias, residual, out, first, first + rows.shape[0]),
            *(m, n, k, x.stride(0), rows.stride(0), stride_rm),
            PERSISTENT=bool(programs),
            EVEN_K=k % meta["BLOCK_K"] == 0,
            SCALE="" if is_scaled(spec, k) else kept,
            WHOLE=whole_scales(operands),
            **meta,
            **epilogue,
        )
    return out


def _described(x: Tensor) -> bool:
    """A descriptor (TMA) may read it."""
    row = x.stride(0) * x.dtype.itemsize
    return row % ALIGNED == 0 and x.stride(0) >= x.shape[1] and is_aligned(x)


def _why_not(problem: Problem, arch: Arch) -> str:
    if reason := why_not_decoded(problem):
        return reason
    least = least_rows(problem)
    return "" if problem.m >= least else f"{problem.m} rows: decoding the weight apart pays from {least} on"


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    slab, maps, unit = slab_rows(problem), int(arch.tensor_maps), by_unit(arch)
    return tuple(
        DECODED_MM.config(
            tile.m, tile.n, tile.k, GROUP_M, slab, tile.programs * arch.board.processors, maps, unit,
            tile.warps, tile.stages,
        )
        for tile in tiles_for(problem, arch)
    )  # fmt: skip


DECODED_MM = TritonKernel(
    name="decoded_mm",
    op="linear",
    fields=(
        "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SLAB", "NUM_PROGRAMS", "TMA", "BY_UNIT", "num_warps", "num_stages",
    ),
    why_not=_why_not,
    candidates=_candidates,
    run=_run,
    summary="float x × codes of any format for many rows: the weight is decoded once, slab by slab",
)  # fmt: skip
