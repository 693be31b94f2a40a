"""coded_mv: one to four rows of float x times a weight of codes in any format, on the ordinary units.

For so few rows the time is that of reading the weight once. A program takes BLOCK_N rows of it and a share of K. A
thread loads 16 bytes of codes, widens them to float32 and multiplies them with x; products of a group are summed up and
multiplied with its scale; at the end the threads of a row are summed, and the shares of K by a second kernel, always in
one order. MODE, UNIT and STEP are as in coded_mm; all arithmetic is float32.
"""

# Triton reads the jit functions, not Python: a constexpr is a plain value there, and tensors take any index.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.coded_products import (
    coded_meta,
    coded_pointers,
    decoded_values,
    epilogue_of,
    granule_rows,
    sum_splits,
    whole_scale,
    whole_scales,
    why_not_coded,
)
from fxquant.triton_kernels.coded_tiles import by_unit, most_rows, strips_for
from fxquant.triton_kernels.decode import load_patterns, scale_value, widen
from fxquant.triton_kernels.epilogue import finish
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import launch, output
from fxquant.triton_kernels.operands import LinearOperands

_BYTES = tl.constexpr(16)  # of a load of a thread


@triton.jit
def _coded_mv(
    x_ptr,
    tiles_ptr,
    scale_ptr,
    zero_ptr,
    whole_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    granules,
    stride_xm,
    stride_tn,
    stride_rm,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN_K: tl.constexpr,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SCHEME: tl.constexpr,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRE: tl.constexpr,
    FLIP: tl.constexpr,
    NANS: tl.constexpr,
    BY_UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """x_ptr [M, K] float, stride (stride_xm, 1), M is ROWS. tiles_ptr uint8 [N, stride_tn]. scale_ptr, zero_ptr
    [granules, N]. whole_ptr float32 [1] or [N]. bias_ptr, residual_ptr as in `finish`. out_ptr [M, N], or float32
    [SPLIT_K, M, N] where SPLIT_K > 1, contiguous. AHEAD: chunks that are loaded beforehand. Programs: (columns,
    SPLIT_K)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held_cols = tl.where(cols < N, cols, 0).to(tl.int64)
    columns = tl.arange(0, STEP)
    tile_at = tiles_ptr + held_cols[:, None] * stride_tn + columns[None, :]
    chunks = tl.cdiv(K, CHUNK)
    share = tl.cdiv(chunks, SPLIT_K)
    first = tl.minimum(tl.program_id(1) * share, chunks)
    last = tl.minimum(first + share, chunks)
    AFFINE: tl.constexpr = SCHEME == "affine"
    SHIFT: tl.constexpr = SCHEME == "shift" and MODE != "value"
    IN_LOOP: tl.constexpr = MODE == "group"
    KEPT: tl.constexpr = STEP // _BYTES if IN_LOOP else STEP  # columns of what is carried from chunk to chunk

    sums = _zeros(BLOCK_N, KEPT, ROWS)
    x_sums = _zeros(1, KEPT, ROWS)
    row_zero = 0
    if AFFINE and MODE == "channel":
        row_zero = tl.load(zero_ptr + cols, mask=cols < N, other=0)[:, None]
    for chunk in tl.range(first, last, num_stages=AHEAD):
        scales = granule_rows(scale_ptr, chunk, cols, N, granules, CHUNK, UNIT, GROUP, IN_LOOP)
        zeros = granule_rows(zero_ptr, chunk, cols, N, granules, CHUNK, UNIT, GROUP, IN_LOOP and SCHEME != "symmetric")
        chunk_tile = tile_at + chunk * (CHUNK * BITS // 8)
        for unit in tl.static_range(CHUNK // UNIT):
            zero = zeros[unit][:, None] if IN_LOOP and AFFINE else row_zero
            part = _zeros(BLOCK_N, STEP, ROWS) if IN_LOOP else sums
            x_part = _zeros(1, STEP, ROWS) if IN_LOOP else x_sums
            for column in tl.static_range(unit * UNIT, unit * UNIT + UNIT, STEP):
                k = chunk * CHUNK + column + columns
                patterns = load_patterns(chunk_tile, 0, 0, None, column, BITS, "pointers")
                if MODE == "value":
                    w = decoded_values(
                        patterns, scale_ptr, zero_ptr, k, held_cols, N, granules, GROUP, SCHEME, SCALE,
                        column, BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT,
                    )  # fmt: skip
                else:
                    w = widen(
                        patterns, zero, tl.float32, column,
                        BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT, AFFINE,
                    )  # fmt: skip
                next_part, next_x = (), ()
                for row in tl.static_range(ROWS):
                    x_at = x_ptr + row * stride_xm + k
                    x = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=k < K, other=0.0)
                    x = x.to(tl.float32)[None, :]
                    next_part += (part[row] + w * x,)
                    next_x += (x_part[row] + x if SHIFT else x_part[row],)
                part, x_part = next_part, next_x
            if IN_LOOP:
                next_sums = ()
                for row in tl.static_range(ROWS):
                    added = _pieces(part[row], BLOCK_N, KEPT) * scale_value(scales[unit], SCALE)[:, None]
                    if SHIFT:
                        added += zeros[unit].to(tl.float32)[:, None] * _pieces(x_part[row], 1, KEPT)
                    next_sums += (sums[row] + added,)
                sums = next_sums
            else:
                sums, x_sums = part, x_part

    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], axis=1)
        if MODE == "channel":
            y *= scale_value(tl.load(scale_ptr + cols, mask=cols < N, other=0), SCALE)
            if SHIFT:
                shift = tl.load(zero_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
                y += shift * tl.sum(tl.sum(x_sums[row], axis=1), axis=0)
        if WHOLE:
            y *= whole_scale(whole_ptr, cols, N, WHOLE)
        rows = tl.full([1], row, tl.int32)
        tile = y[None, :]
        at = row * tl.cast(N, tl.int64) + cols[None, :]
        if SPLIT_K > 1:
            at += tl.program_id(1) * tl.cast(M, tl.int64) * N
        else:
            tile = finish(
                tile, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
            )  # fmt: skip
        tl.store(out_ptr + at, tile, mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _zeros(HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors [HEIGHT, WIDTH] of float32 zeros."""
    held = ()
    for _ in tl.static_range(COUNT):
        held += (tl.zeros([HEIGHT, WIDTH], tl.float32),)
    return held


@triton.jit
def _pieces(products, HEIGHT: tl.constexpr, PIECES: tl.constexpr):
    """Sums of what a thread holds of a row: [HEIGHT, PIECES * 16] -> [HEIGHT, PIECES]."""
    return tl.sum(tl.reshape(products, [HEIGHT, PIECES, _BYTES]), axis=2)


def _run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    meta = config.meta
    x = operands.x if operands.x.stride(-1) == 1 else operands.x.contiguous()
    m, n, k, splits = x.shape[0], operands.out_features, operands.in_features, meta["SPLIT_K"]
    coded = coded_meta(TensorSpec.parse(operands.spec), k, x.dtype)
    coded.pop("WIDE")
    (bias, residual, stride_rm), epilogue = epilogue_of(operands)
    out = output((m, n), operands.dtype, x.device)
    into = output((splits, m, n), torch.float32, x.device) if splits > 1 else out
    tiles, scale, zero, whole = coded_pointers(operands)
    launch(
        _coded_mv,
        (triton.cdiv(n, meta["BLOCK_N"]) * min(m, 1), splits),
        *(x, tiles, scale, zero, whole, bias, residual, into),
        *(m, n, k, scale.shape[0], x.stride(0), tiles.stride(0), stride_rm),
        ROWS=max(m, 1),
        EVEN_K=k % coded["CHUNK"] == 0,
        WHOLE=whole_scales(operands),
        **coded,
        **meta,
        **epilogue,
    )
    if splits > 1:
        sum_splits(into, out, operands)
    return out


def _why_not(problem: Problem, arch: Arch) -> str:
    if why := why_not_coded(problem):
        return why
    most = most_rows(problem)
    return f"{problem.m} rows: of {problem.weights} it takes up to {most}" if problem.m > most else ""


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    return tuple(CODED_MV.config(*strip[:3], by_unit(arch), strip[3]) for strip in strips_for(problem, arch))


CODED_MV = TritonKernel(
    name="coded_mv",
    op="linear",
    fields=("BLOCK_N", "SPLIT_K", "AHEAD", "BY_UNIT", "num_warps"),
    why_not=_why_not,
    candidates=_candidates,
    run=_run,
    summary="up to 4 rows of float x × codes of any format, on the ordinary units",
)
