"""What the kernels of weight-only linears share: their operands as pointers and constexprs, and sums of split products.

MODE says where scales meet products: 'channel', once a row of the weight; 'group', once a group; 'value', once a code.
"""

# Triton reads the jit functions, not Python: a constexpr is a plain value there, and tensors take any index.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.numerics.panels import fits_panels, granules_along
from fxquant.numerics.tiles import chunk_width, part_width
from fxquant.spec import TensorSpec
from fxquant.target import Problem
from fxquant.triton_kernels.decode import fits_float16, format_meta, scale_value, widen
from fxquant.triton_kernels.epilogue import epilogue_meta, finish
from fxquant.triton_kernels.launching import launch
from fxquant.triton_kernels.operands import LinearOperands

LEAST_STEP = 16  # columns: the least that a matrix instruction on half types takes
SUM_BLOCK_M, SUM_BLOCK_N = 4, 256


def why_not_coded(problem: Problem) -> str:
    """Why no kernel of this family takes the problem; '' if they do."""
    if problem.activations:
        return f"activations {problem.activations}: it takes a float x"
    if not fits_panels(TensorSpec.parse(problem.weights)):
        return f"weights {problem.weights}: scales along axis 0, groups and blocks only"
    return ""


def coded_meta(spec: TensorSpec, in_features: int, x_dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs of a weight, as keywords of `launch`.

    CHUNK: columns of a chunk. UNIT: columns that share a scale for certain, at most a chunk. STEP: columns of one
    product, within a part. GROUP: columns of a group, 0 if there is one for a row. WIDE: products in float32.
    """
    bits, size = spec.format.bits, spec.granularity.size
    chunk, width = chunk_width(bits), part_width(bits)
    grouped = granules_along(in_features, spec) > 1
    unit = math.gcd(size, chunk) if grouped else chunk
    mode = "channel" if not grouped else "group" if unit >= LEAST_STEP else "value"
    if mode == "value":
        unit = width
    wide = x_dtype == torch.float32 or mode == "value" or (x_dtype == torch.float16 and not fits_float16(spec))
    return {
        **format_meta(spec),
        "MODE": mode,
        "CHUNK": chunk,
        "UNIT": unit,
        "STEP": min(unit, width),
        "GROUP": size if grouped else 0,
        "SCHEME": spec.scheme,
        "SCALE": spec.scale if spec.scale in ("e8m0", "e4m3") else "float",
        "WIDE": wide,
    }


def coded_pointers(operands: LinearOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tiles, scale, zero_point, tensor_scale); scales of one byte as uint8, and `scale` for what there is not."""
    scale = operands.scale.view(torch.uint8) if operands.scale.dtype.itemsize == 1 else operands.scale
    zero = scale if operands.zero_point is None else operands.zero_point
    whole = scale if operands.tensor_scale is None else operands.tensor_scale
    return operands.tiles, scale, zero, whole


def whole_scales(operands: LinearOperands) -> int:
    """WHOLE: how many tensor scales there are: 0, 1 for all rows, or 2: one for each."""
    if operands.tensor_scale is None:
        return 0
    return 1 if operands.tensor_scale.numel() == 1 else 2


@triton.jit
def whole_scale(whole_ptr, cols, N, WHOLE: tl.constexpr):
    """Tensor scales of those rows of the weight, float32 [BLOCK_N]; WHOLE is not 0."""
    return tl.load(whole_ptr + (cols if WHOLE == 2 else cols * 0), mask=cols < N, other=0.0)


@triton.jit
def granule_rows(
    ptr, chunk, cols, N, granules, CHUNK: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, HAS: tl.constexpr
):
    """What the units of a chunk have of a tensor [granules, N]: CHUNK / UNIT tensors [BLOCK_N] as they are stored.

    Beyond the last granule, where x is 0, the last one again. Nothing if not HAS.
    """
    held = ()
    if HAS:
        for unit in tl.static_range(CHUNK // UNIT):
            granule = chunk // (GROUP // CHUNK) if GROUP % CHUNK == 0 else (chunk * CHUNK + unit * UNIT) // GROUP
            granule = tl.minimum(granule, granules - 1)
            held += (tl.load(ptr + granule.to(tl.int64) * N + cols, mask=cols < N, other=0),)
    return held


@triton.jit
def decoded_values(
    patterns,
    scale_ptr,
    zero_ptr,
    k,
    cols,
    N,
    granules,
    GROUP: tl.constexpr,
    SCHEME: tl.constexpr,
    SCALE: tl.constexpr,
    COLUMN: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRE: tl.constexpr,
    FLIP: tl.constexpr,
    NANS: tl.constexpr,
    BY_UNIT: tl.constexpr,
):
    """Decoded weights, float32 [BLOCK_N, STEP]: each column has a granule of its own."""
    at = tl.minimum(k // GROUP, granules - 1).to(tl.int64)[None, :] * N + cols[:, None]
    scale = scale_value(tl.load(scale_ptr + at), SCALE)
    zero = tl.load(zero_ptr + at) if SCHEME != "symmetric" else 0
    codes = widen(
        patterns, zero, tl.float32, COLUMN,
        BITS, EXPONENT, MANTISSA, BIAS, CENTRE, FLIP, NANS, BY_UNIT, SCHEME == "affine",
    )  # fmt: skip
    value = codes * scale
    return value + zero.to(tl.float32) if SCHEME == "shift" else value


@triton.jit
def _sum_splits(
    parts_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    stride_rm,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """parts_ptr float32 [SPLIT_K, M, N], contiguous, summed first to last; out_ptr [M, N], contiguous; the others as in
    `finish`. Programs: (rows, columns)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in tl.static_range(SPLIT_K):
        y += tl.load(parts_ptr + split * tl.cast(M, tl.int64) * N + at, mask=inside, other=0.0)
    y = finish(y, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    tl.store(out_ptr + at, y, mask=inside)


def epilogue_of(operands: LinearOperands) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
    """(bias, residual, stride of its rows) and the constexprs of `finish`; tiles stand for what there is not."""
    residual = operands.residual
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    stride = 0 if residual is None else residual.stride(0)
    held = (
        operands.tiles if operands.bias is None else operands.bias,
        operands.tiles if residual is None else residual,
        stride,
    )
    return held, epilogue_meta(operands.bias, residual, operands.activation)


def sum_splits(parts: Tensor, out: Tensor, operands: LinearOperands) -> None:
    """The sum of float32 parts [SPLIT_K, M, N], always in one order, with the epilogue of the operands, into `out`."""
    (bias, residual, stride), meta = epilogue_of(operands)
    splits, m, n = parts.shape
    grid = (triton.cdiv(m, SUM_BLOCK_M), triton.cdiv(n, SUM_BLOCK_N))  # the second one is 65535 at most
    launch(
        _sum_splits, grid, parts, out, bias, residual, m, n, stride,
        SPLIT_K=splits, BLOCK_M=SUM_BLOCK_M, BLOCK_N=SUM_BLOCK_N, num_warps=4, **meta,
    )  # fmt: skip
