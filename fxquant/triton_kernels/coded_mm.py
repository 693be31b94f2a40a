"""coded_mm: float x times a weight of codes in any format, on matrix units: y = x @ decode(tiles).T.

The product is computed transposed, [BLOCK_N, BLOCK_M]: the weight is the left operand, which mma.sync, wgmma and
tcgen05 may take from registers (tensor memory), where it was decoded, and x the right one, out of shared memory. So a
decoded weight is never written to shared memory, and few rows of x fill the narrow side of the instruction.

The K loop takes a chunk of the tiles at a time, within it a part, or a piece of a part where a group is smaller. Codes
are widened exactly and multiplied as they are; scales are applied to sums in float32:

channel  scales of rows: once, after the loop.
group    groups of a multiple of 16 columns: to the sum of the group, or of its part in a chunk. That costs BLOCK_M
         multiplications for each row of a group; scaling the codes costs one for each column and rounds each product to
         the half type. So it is the cheaper way too, as long as BLOCK_M is not beyond the group's size.
         Groups of 16 make products of 16 columns, and on mma.sync and mfma loads of 4 or 8 bytes a thread.
value    other groups: code * scale (+ shift) in float32, times x in float32. Slow and exact; nobody should need it.

Products are summed in float32. Where a side is not exact in a half type (x float32; floats of 5 and more exponent bits
under float16; `value`) they are float32: by tf32 on NVIDIA (TF32), once where both sides fit it, else by three products
that leave an error of 2**-21 of a product; true float32 on AMD.
"""

# Triton reads the jit functions, not Python: a constexpr is a plain value there, and tensors take any index.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
from fxquant.triton_kernels.coded_tiles import LOAD, by_unit, tiles_for
from fxquant.triton_kernels.decode import load_patterns, scale_value, widen
from fxquant.triton_kernels.epilogue import finish
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import is_aligned, launch, output
from fxquant.triton_kernels.operands import DTYPES, LinearOperands

GROUP_M = 8


@triton.jit
def _coded_mm(
    x_ptr,
    tiles,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TF32: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SCHEME: tl.constexpr,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
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
    """x_ptr [M, K] float, stride (stride_xm, 1). tiles: uint8 [N, stride_tn], a
    pointer, or where TMA a descriptor of blocks [BLOCK_N, STEP]. scale_ptr, zero_ptr [granules, N].
    whole_ptr float32 [1] or [N]. bias_ptr, residual_ptr as in `finish`. out_ptr [M, N], or float32 [SPLIT_K, M, N]
    where SPLIT_K > 1, contiguous. Programs: (tiles, SPLIT_K)."""
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows, cols = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    held_rows, held_cols = tl.where(rows < M, rows, 0).to(tl.int64), tl.where(cols < N, cols, 0).to(tl.int64)
    columns = tl.arange(0, STEP)
    x_at = x_ptr + held_rows[:, None] * stride_xm + columns[None, :]
    BY: tl.constexpr = "descriptor" if TMA else "pointers"
    tile_at = tiles if TMA else tiles + held_cols[:, None] * stride_tn + columns[None, :]

    chunks = tl.cdiv(K, CHUNK)
    first, last = 0, chunks
    if SPLIT_K > 1:
        share = tl.cdiv(chunks, SPLIT_K)
        first = tl.minimum(tl.program_id(1) * share, chunks)
        last = tl.minimum(first + share, chunks)
    HALF: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    X_IS_HALF: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    PRECISION: tl.constexpr = "ieee" if not TF32 else "tf32" if X_IS_HALF and MODE != "value" else "tf32x3"
    AFFINE: tl.constexpr = SCHEME == "affine"
    SHIFT: tl.constexpr = SCHEME == "shift"
    IN_LOOP: tl.constexpr = MODE == "group"

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([BLOCK_M], tl.float32)
    row_zero = 0
    if AFFINE and MODE == "channel":
        row_zero = tl.load(zero_ptr + cols, mask=cols < N, other=0)[:, None]
    # Scales are read a chunk ahead into registers: a load that no product waits for is not put into the pipeline.
    scales = granule_rows(scale_ptr, first, cols, N, granules, CHUNK, UNIT, GROUP, IN_LOOP)
    zeros = granule_rows(zero_ptr, first, cols, N, granules, CHUNK, UNIT, GROUP, IN_LOOP and SCHEME != "symmetric")
    for chunk in range(first, last):
        next_scales = granule_rows(scale_ptr, chunk + 1, cols, N, granules, CHUNK, UNIT, GROUP, IN_LOOP)
        next_zeros = granule_rows(
            zero_ptr, chunk + 1, cols, N, granules, CHUNK, UNIT, GROUP, IN_LOOP and SCHEME != "symmetric"
        )
        byte = chunk * (CHUNK * BITS // 8)
        chunk_x, chunk_tile = x_at + chunk * CHUNK, tile_at if TMA else tile_at + byte
        for unit in tl.static_range(CHUNK // UNIT):
            zero = row_zero
            if IN_LOOP:
                zero = zeros[unit][:, None] if AFFINE else row_zero
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                part_sum = tl.zeros([BLOCK_M], tl.float32)
            for column in tl.static_range(unit * UNIT, unit * UNIT + UNIT, STEP):
                k = chunk * CHUNK + column + columns
                x_cut = chunk_x + column
                x = tl.load(x_cut) if EVEN_K else tl.load(x_cut, mask=(k < K)[None, :], other=0.0)
                patterns = load_patterns(chunk_tile, tile_n * BLOCK_N, byte, None, column, BITS, BY)
                if MODE == "value":
                    w = decoded_values(
                        patterns, scale_ptr, zero_ptr, k, held_cols, N, granules, GROUP, SCHEME, SCALE,
                        column, BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT,
                    )  # fmt: skip
                else:
                    w = widen(
                        patterns, zero, HALF, column,
                        BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT, AFFINE,
                    )  # fmt: skip
                if SHIFT and MODE != "value":
                    sums = tl.sum(x.to(tl.float32), axis=1)
                    if IN_LOOP:
                        part_sum += sums
                    else:
                        x_sum += sums
                if IN_LOOP:
                    part = tl.dot(w, tl.trans(x.to(HALF)), part, input_precision=PRECISION)
                else:
                    acc = tl.dot(w, tl.trans(x.to(HALF)), acc, input_precision=PRECISION)
            if IN_LOOP:
                acc += part * scale_value(scales[unit], SCALE)[:, None]
                if SHIFT:
                    acc += zeros[unit].to(tl.float32)[:, None] * part_sum[None, :]
        scales, zeros = next_scales, next_zeros

    if MODE == "channel":
        acc *= scale_value(tl.load(scale_ptr + cols, mask=cols < N, other=0), SCALE)[:, None]
        if SHIFT:
            shift = tl.load(zero_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
            acc += shift[:, None] * x_sum[None, :]
    if WHOLE:
        acc *= whole_scale(whole_ptr, cols, N, WHOLE)[:, None]
    y = tl.trans(acc)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if SPLIT_K > 1:
        at += tl.program_id(1) * tl.cast(M, tl.int64) * N
    else:
        y = finish(y, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    tl.store(out_ptr + at, y, mask=inside)


@triton.jit
def _tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile along M, tile along N): GROUP_M tiles along M share the tiles of a weight that are in the cache."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    together = GROUP_M * tiles_n
    begin = index // together * GROUP_M
    height = tl.minimum(tiles_m - begin, GROUP_M)
    return begin + index % together % height, index % together // height


def _run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    meta = config.meta
    x = operands.x if operands.x.stride(-1) == 1 else operands.x.contiguous()
    m, n, k, splits = x.shape[0], operands.out_features, operands.in_features, meta["SPLIT_K"]
    spec = TensorSpec.parse(operands.spec)
    coded = coded_meta(spec, k, x.dtype)
    (bias, residual, stride_rm), epilogue = epilogue_of(operands)
    out = output((m, n), operands.dtype, x.device)
    into = output((splits, m, n), torch.float32, x.device) if splits > 1 else out
    tiles, scale, zero, whole = coded_pointers(operands)
    if n == 0 or not is_aligned(tiles):
        meta["TMA"] = 0
    source = TensorDescriptor.from_tensor(tiles, [meta["BLOCK_N"], coded["STEP"]]) if meta["TMA"] else tiles
    launch(
        _coded_mm,
        (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]), splits),
        *(x, source, scale, zero, whole, bias, residual, into),
        *(m, n, k, scale.shape[0], x.stride(0), tiles.stride(0), stride_rm),
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
    return why_not_coded(problem)


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    tf32, maps = int(arch.backend == "cuda"), int(arch.tensor_maps)
    unit = by_unit(arch)
    tiles = tiles_for(problem, arch)
    best = [CODED_MM.config(*tile[:3], GROUP_M, tf32, maps, unit, *tile[3:]) for tile in tiles]
    # Pointers instead of TMA: where they are read 16 bytes a thread, which whole bytes and codes in two planes are not.
    spec, (_, n, _, warps, _) = TensorSpec.parse(problem.weights), tiles[0]
    step = coded_meta(spec, problem.k, DTYPES[problem.dtype])["STEP"]
    if arch.compute == 90 and spec.format.bits in (2, 4) and n * step >= LOAD * warps * arch.warp_size:
        best.insert(1, CODED_MM.config(*tiles[0][:3], GROUP_M, tf32, 0, unit, *tiles[0][3:]))
    return tuple(best)


CODED_MM = TritonKernel(
    name="coded_mm",
    op="linear",
    fields=("BLOCK_M", "BLOCK_N", "SPLIT_K", "GROUP_M", "TF32", "TMA", "BY_UNIT", "num_warps", "num_stages"),
    why_not=_why_not,
    candidates=_candidates,
    run=_run,
    summary="float x × codes of any format, decoded in registers, on matrix units",
)
