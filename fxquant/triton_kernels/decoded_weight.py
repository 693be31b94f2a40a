"""A weight of codes written out in a half type, a slab of its rows at a time, for a product that multiplies halves.

Where a row has one scale, codes are written without it, exactly: the product scales its sums. Else code times scale
(plus shift), computed in float32 and rounded once. A code times a power of two (e8m0) is exact in bfloat16, and in
float16 within its range. The slab [rows, K up to the next chunk] is contiguous; columns beyond K are finite wherever
scales are, and meet zeros of x.
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
from fxquant.target import Problem
from fxquant.triton_kernels.coded_products import coded_meta, coded_pointers, decoded_values, why_not_coded
from fxquant.triton_kernels.decode import fits_float16, load_patterns, scale_value, widen
from fxquant.triton_kernels.launching import launch, output
from fxquant.triton_kernels.operands import LinearOperands

BLOCK_ROWS, WARPS = 64, 4  # of a program, which writes a chunk of so many rows
_ONE_GROUP = 1 << 30  # columns: no row is longer


@triton.jit
def _decoded(
    tiles,
    scale_ptr,
    zero_ptr,
    slab_ptr,
    first,
    rows_end,
    N,
    granules,
    stride_tn,
    stride_slab,
    BLOCK_ROWS: tl.constexpr,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SCHEME: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRE: tl.constexpr,
    FLIP: tl.constexpr,
    NANS: tl.constexpr,
    BY_UNIT: tl.constexpr,
):
    """tiles uint8 [N, stride_tn]; scale_ptr, zero_ptr [granules, N]; slab_ptr half [rows_end - first, stride_slab], the
    rows from first on. MODE 'channel': codes less zero points. 'group', 'value': scaled, by what a product of STEP
    columns has one of, or each column. Program (BLOCK_ROWS rows, chunk)."""
    rows = first + tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    chunk, columns = tl.program_id(1), tl.arange(0, STEP)
    inside = rows < rows_end
    held = tl.where(inside, rows, first).to(tl.int64)
    tile_at = tiles + held[:, None] * stride_tn + columns[None, :] + chunk * (CHUNK * BITS // 8)
    slab_at = slab_ptr + (held - first)[:, None] * stride_slab + chunk * CHUNK + columns[None, :]
    HALF: tl.constexpr = slab_ptr.dtype.element_ty
    AFFINE: tl.constexpr = SCHEME == "affine"
    zero = 0
    if AFFINE and MODE == "channel":
        zero = tl.load(zero_ptr + held)[:, None]
    for column in tl.static_range(0, CHUNK, STEP):
        patterns = load_patterns(tile_at, 0, 0, None, column, BITS, "pointers")
        if MODE == "value":
            w = decoded_values(
                patterns, scale_ptr, zero_ptr, chunk * CHUNK + column + columns, held, N, granules, GROUP, SCHEME,
                SCALE, column, BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT,
            )  # fmt: skip
        elif MODE == "group":
            at = tl.minimum((chunk * CHUNK + column) // GROUP, granules - 1).to(tl.int64) * N + held
            if SCHEME != "symmetric":
                zero = tl.load(zero_ptr + at)[:, None]
            w = widen(
                patterns, zero, tl.float32, column,
                BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT, AFFINE,
            )  # fmt: skip
            w *= scale_value(tl.load(scale_ptr + at), SCALE)[:, None]
            if SCHEME == "shift":
                w += zero.to(tl.float32)
        else:
            w = widen(
                patterns, zero, HALF, column,
                BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT, AFFINE,
            )  # fmt: skip
        tl.store(slab_at + column, w.to(HALF), mask=inside[:, None])


def why_not_decoded(problem: Problem) -> str:
    """Why no weight of that problem is written out in its dtype; '' if it may be."""
    if reason := why_not_coded(problem):
        return reason
    if problem.dtype == "float32":
        return "x is float32: it multiplies halves"
    if problem.dtype == "float16" and not fits_float16(TensorSpec.parse(problem.weights)):
        return f"float16 doesn't hold every code of {problem.weights}"
    return ""


def is_scaled(spec: TensorSpec, in_features: int) -> bool:
    """Whether the slab has scales in it. If not, the product scales: a row's codes are exact, and a shift is 0."""
    return spec.scheme == "shift" or coded_meta(spec, in_features, torch.bfloat16)["MODE"] != "channel"


def slab_width(spec: TensorSpec, in_features: int) -> int:
    """Columns of a slab: K up to the next chunk."""
    chunk = coded_meta(spec, in_features, torch.bfloat16)["CHUNK"]
    return triton.cdiv(in_features, chunk) * chunk


def empty_slab(rows: int, operands: LinearOperands) -> Tensor:
    """Room for that many rows of the weight, of the operands' dtype."""
    spec = TensorSpec.parse(operands.spec)
    return output((rows, slab_width(spec, operands.in_features)), operands.dtype, operands.x.device)


def decode_rows(slab: Tensor, first: int, operands: LinearOperands, by_unit: int) -> None:
    """Write rows first, first + 1, … of the operands' weight into the slab [rows, K up to the next chunk]."""
    spec = TensorSpec.parse(operands.spec)
    meta = coded_meta(spec, operands.in_features, slab.dtype)
    if meta["MODE"] == "channel" and is_scaled(spec, operands.in_features):
        meta |= {"MODE": "group", "GROUP": _ONE_GROUP}
    tiles, scale, zero, _ = coded_pointers(operands)
    rows = slab.shape[0]
    launch(
        _decoded,
        (triton.cdiv(rows, BLOCK_ROWS), slab.shape[1] // meta["CHUNK"]),
        *(tiles, scale, zero, slab, first, first + rows, operands.out_features, scale.shape[0]),
        *(tiles.stride(0), slab.stride(0)),
        BLOCK_ROWS=BLOCK_ROWS,
        BY_UNIT=by_unit,
        num_warps=WARPS,
        **meta,
    )
