"""Rows of a packed table, looked up and decoded: bit-equal to `fxquant.numerics.decode` of the whole table.

(value(code) - zero_point) * scale * tensor_scale, or value(code) * scale + shift: float32, in that order, one rounding
to the result's dtype (compiled without fused multiply-add). A row that the table has not is NaN, not what lies behind
the table; the reference raises IndexError there, which a GPU cannot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.decode import format_meta, scale_value
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import launch, output
from fxquant.triton_kernels.operands import EmbeddingOperands

_NAME = "embedding_rows"


@triton.jit
def _codes_of_bytes(row_ptrs, inside, start, row_bytes, BITS: tl.constexpr, C: tl.constexpr):
    """Codes of 1, 2, 4 or 8 bits: the columns from start of rows [R, 1], uint8 [R, C]; each byte is read once."""
    SLOTS: tl.constexpr = 8 // BITS
    place = start // SLOTS + tl.arange(0, C // SLOTS)
    found = tl.load(row_ptrs + place[None, :], mask=inside & (place < row_bytes)[None, :], other=0)
    if BITS < 8:
        slots = found[:, :, None].to(tl.uint16) >> (tl.arange(0, SLOTS) * BITS).to(tl.uint16)[None, None, :]
        found = tl.reshape((slots & (2**BITS - 1)).to(tl.uint8), [found.shape[0], C])
    return found


@triton.jit
def _codes_of_stream(row_ptrs, inside, start, row_bytes, BITS: tl.constexpr, C: tl.constexpr):
    """The same of codes that lie across bytes: each code's byte and the next."""
    first = (start + tl.arange(0, C)) * BITS
    place = first >> 3
    low = tl.load(row_ptrs + place[None, :], mask=inside & (place < row_bytes)[None, :], other=0)
    high = tl.load(row_ptrs + place[None, :] + 1, mask=inside & (place + 1 < row_bytes)[None, :], other=0)
    word = low.to(tl.uint16) | (high.to(tl.uint16) << 8)
    return ((word >> (first & 7).to(tl.uint16)[None, :]) & (2**BITS - 1)).to(tl.uint8)


@triton.jit
def _values_of_codes(
    codes, zero, BITS: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    NANS: tl.constexpr, SCHEME: tl.constexpr,
):  # fmt: skip
    """What a code's own bits, uint8, stand for under scale 1; less the zero point, if affine. Exact, float32."""
    if EXPONENT == 0:
        whole = codes.to(tl.int32)
        if SCHEME == "symmetric":
            whole = (whole ^ 2 ** (BITS - 1)) - 2 ** (BITS - 1)
        elif SCHEME == "affine":
            whole = whole - zero.to(tl.int32)
        values = whole.to(tl.float32)
    elif NANS == "ieee":  # float8_e5m2 is float16 cut short
        values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # At the places of float32's fields the value is 2**(BIAS - 127) times as large, subnormals too.
        magnitude = (codes & (2 ** (BITS - 1) - 1)).to(tl.uint32) << (23 - MANTISSA)
        sign = (codes >> (BITS - 1)).to(tl.uint32) << 31
        values = (magnitude | sign).to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))
        if NANS == "all_ones":
            values = tl.where((codes & 0x7F) == 0x7F, float("nan"), values)
        elif NANS == "minus_zero":
            values = tl.where(codes == 0x80, float("nan"), values)
    return values


@triton.jit
def embedding_rows(
    indices_ptr,  # [M] int32 or int64, contiguous
    table_ptr,  # [N, row_bytes] uint8, contiguous
    scale_ptr,  # [rows of granules, granules along K], strides stride_sr, stride_sc; float32, bfloat16 or uint8
    zero_ptr,  # uint8 (affine) or the scale's dtype (shift), in the shape and with the strides of scale; or None
    tensor_scale_ptr,  # [1] or [N] float32, stride stride_t; or None
    out_ptr,  # [M, K] float16, bfloat16 or float32, contiguous
    M, N, K, row_bytes, stride_sr, stride_sc, stride_t,
    ROWS: tl.constexpr,  # rows that share a granule
    COLS: tl.constexpr,  # columns that share a granule
    SCHEME: tl.constexpr,  # 'symmetric', 'affine' or 'shift'
    SCALE: tl.constexpr,  # 'float32', 'bfloat16', 'e8m0' or 'e4m3'
    HAS_TENSOR_SCALE: tl.constexpr,
    BITS: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,  # of the format
    NANS: tl.constexpr,  # see `decode.format_meta`
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M indices and BLOCK_K columns a program."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.load(indices_ptr + at, mask=at < M, other=-1).to(tl.int64)
    known = (index >= 0) & (index < N)
    start = tl.program_id(1) * BLOCK_K
    row_ptrs = table_ptr + (index * row_bytes)[:, None]
    if (BITS & (BITS - 1)) == 0:
        codes = _codes_of_bytes(row_ptrs, known[:, None], start, row_bytes, BITS, BLOCK_K)
    else:
        codes = _codes_of_stream(row_ptrs, known[:, None], start, row_bytes, BITS, BLOCK_K)
    cols = start + tl.arange(0, BLOCK_K)
    inside = known[:, None] & (cols < K)[None, :]
    granule = (index // ROWS * stride_sr)[:, None] + (cols // COLS * stride_sc)[None, :]
    zero = codes
    if SCHEME != "symmetric":
        zero = tl.load(zero_ptr + granule, mask=inside, other=0)
    values = _values_of_codes(codes, zero, BITS, EXPONENT, MANTISSA, BIAS, NANS, SCHEME)
    values *= scale_value(tl.load(scale_ptr + granule, mask=inside, other=0), SCALE)
    if HAS_TENSOR_SCALE:
        values *= tl.load(tensor_scale_ptr + index * stride_t, mask=known, other=0.0)[:, None]
    if SCHEME == "shift":
        values += zero.to(tl.float32)
    values = tl.where(known[:, None], values, float("nan"))
    stored = (at < M)[:, None] & (cols < K)[None, :]
    tl.store(out_ptr + at[:, None].to(tl.int64) * K + cols[None, :], values.to(out_ptr.dtype.element_ty), mask=stored)


def run(operands: EmbeddingOperands, config: KernelConfig) -> Tensor:
    """The rows [M, K] in operands.dtype."""
    spec, k = TensorSpec.parse(operands.spec), operands.in_features
    indices, table = operands.indices.contiguous(), operands.rows.contiguous()
    out = output([indices.shape[0], k], operands.dtype, table.device)
    if out.numel() == 0:
        return out
    granularity, scale = spec.granularity, operands.scale.contiguous()
    zero = operands.zero_point.contiguous() if spec.has_zero_point and operands.zero_point is not None else None
    whole = operands.tensor_scale.contiguous() if spec.has_tensor_scale and operands.tensor_scale is not None else None
    along, form = scale.shape[1] > 1, format_meta(spec)
    launch(
        embedding_rows,
        (triton.cdiv(indices.shape[0], config["BLOCK_M"]), triton.cdiv(k, config["BLOCK_K"])),
        indices, table, _bits_of(scale), zero, whole, out,
        indices.shape[0], table.shape[0], k, table.shape[1],
        scale.stride(0) if scale.shape[0] > 1 else 0, 1 if along else 0,
        1 if whole is not None and whole.shape[0] > 1 else 0,
        ROWS=granularity.rows if granularity.kind == "block" else 1,
        COLS=granularity.size if granularity.size and along else 1,
        SCHEME=spec.scheme, SCALE=spec.scale, HAS_TENSOR_SCALE=whole is not None,
        **{name: form[name] for name in ("BITS", "EXPONENT", "MANTISSA", "BIAS", "NANS")},
        BLOCK_M=config["BLOCK_M"], BLOCK_K=config["BLOCK_K"],
        num_warps=config["num_warps"], enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _bits_of(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale


def _why_not(problem: Problem, arch: Arch) -> str:
    return "" if problem.op == "embedding" else f"it looks up rows of a table, and is no {problem.op}"


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    """Threads for 8 to 16 values each; several short rows a program where there are many."""
    width = triton.next_power_of_2(max(problem.k, 16))
    made: dict[KernelConfig, None] = {}
    for block_k, tile in ((1024, 1024), (512, 512), (1024, 2048), (2048, 2048), (256, 1024)):
        block_k = min(block_k, width)
        block_m = max(1, min(tile // block_k, triton.next_power_of_2(problem.m)))
        warps = min(max(block_m * block_k // (8 * arch.warp_size), 1), 8)
        made[EMBEDDING_ROWS.config(block_m, block_k, warps)] = None
    return tuple(made)


EMBEDDING_ROWS = TritonKernel(
    name=_NAME,
    op="embedding",
    fields=("BLOCK_M", "BLOCK_K", "num_warps"),
    why_not=_why_not,
    candidates=_candidates,
    run=run,
    summary="rows of a packed table in any format, looked up and decoded",
)
