"""What all kernels of 8-bit codes times 8-bit codes have in common: the sums of products, and the scales after them.

int8 codes are summed exactly in int32. float8 codes are summed in float32; matrix units that keep fewer bits between
additions (sm90) hand their sums over every 128 products, so that the error stays that of float32 sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.numerics.panels import granules_along
from fxquant.spec import TensorSpec
from fxquant.target import Arch, Problem
from fxquant.triton_kernels.epilogue import epilogue_meta, finish
from fxquant.triton_kernels.launching import ALIGNED, is_aligned
from fxquant.triton_kernels.operands import LinearOperands

# So many products of two int8 codes fit int32: 2**17 * 127 * 127 < 2**31.
MOST_IN_INT32 = 2**17
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Values of the field DECODE: how float8 gets into the matrix unit.
AS_THEY_ARE, AS_FLOAT16, BY_SHIFTS = 0, 1, 2


# Activations may hold NaN codes, weights don't.
_OF_X, _OF_WEIGHT = tl.constexpr(True), tl.constexpr(False)


@triton.jit
def sums_of_products(
    x_ptr,
    w_ptr,
    row,
    col,
    k_begin,
    k_end,
    M,
    N,
    K,
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
    """The tile [BLOCK_M, BLOCK_N] at (row, col) of x times w transposed, over k_begin <= k < k_end: int32 or float32.

    x_ptr      codes [M, K], stride (stride_xm, 1): int8, float8, or uint8 that X_DECODE names.
    w_ptr      codes [N, stride_wn], stride (stride_wn, 1), 0 beyond K: as x.
    k_begin    a multiple of BLOCK_K. Rows and columns outside repeat the last one.
    EVEN_K     K, and EVEN_W stride_wn, is a multiple of BLOCK_K: nothing is masked.
    """
    # 64 bits only where the tile begins: within it 32 do.
    x_ptr += row.to(tl.int64) * stride_xm + k_begin
    w_ptr += col.to(tl.int64) * stride_wn + k_begin
    ks = tl.arange(0, BLOCK_K)
    x_at = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)[:, None] * stride_xm + ks[None, :]
    w_at = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - col)[:, None] * stride_wn + ks[None, :]
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        x = tl.load(x_ptr + x_at) if EVEN_K else tl.load(x_ptr + x_at, mask=ks[None, :] < K - k, other=0.0)
        w = tl.load(w_ptr + w_at) if EVEN_W else tl.load(w_ptr + w_at, mask=ks[None, :] < stride_wn - k, other=0.0)
        acc = add_products(acc, x, w, X_DECODE, W_DECODE)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    return decoded_sums(acc, X_DECODE, W_DECODE)


@triton.jit
def add_products(acc, x, w, X_DECODE: tl.constexpr, W_DECODE: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] plus x [BLOCK_M, BLOCK_K] times w [BLOCK_N, BLOCK_K] transposed."""
    if acc.dtype == tl.int32:
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    elif X_DECODE != "":
        acc = tl.dot(half_of(x, X_DECODE, _OF_X), half_of(w, W_DECODE, _OF_WEIGHT).T, acc)
    else:
        acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=128 if x.shape[1] > 128 else x.shape[1])
    return acc


@triton.jit
def decoded_sums(acc, X_DECODE: tl.constexpr, W_DECODE: tl.constexpr):
    """Sums of products of what `half_of` gave -> sums of products of the values; exact."""
    if X_DECODE != "" and X_DECODE != "e5m2":
        acc *= 256.0
    if W_DECODE != "" and W_DECODE != "e5m2":
        acc *= 256.0
    return acc


@triton.jit
def half_of(codes, FORMAT: tl.constexpr, MAY_BE_NAN: tl.constexpr):
    """Bits of float8 in uint8 -> float16, exactly: the values of 'e5m2', those of 'e4m3fn' times 2**-8.

    e4m3fn: bits moved to where float16 has its own, whose exponent has a larger bias. That is what float8e4b15 means,
    which NVIDIA's GPUs unpack four at a time; elsewhere ('e4m3fn_shifted') shifts do it.
    """
    if FORMAT == "e5m2":
        value = codes.to(tl.float8e5, bitcast=True).to(tl.float16)
    else:
        if FORMAT == "e4m3fn":
            value = codes.to(tl.float8e4b15, bitcast=True).to(tl.float16)
        else:
            tl.static_assert(FORMAT == "e4m3fn_shifted", "no such float8")
            wide = codes.to(tl.uint16)
            value = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        if MAY_BE_NAN:  # the code above the largest, 448 * 2**-8
            value = tl.where(tl.abs(value) > 1.75, float("nan"), value)
    return value


@triton.jit
def store_scaled(
    acc,
    out_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows,
    cols,
    M,
    N,
    stride_xs,
    stride_rm,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out[rows, cols] = activation(acc * (x_scale * scale) + bias) + residual, rounded once.

    acc          int32 or float32 [BLOCK_M, BLOCK_N].
    out_ptr      [M, N] float, contiguous.
    x_scale_ptr  float32, stride_xs apart: [M], or [1] where stride_xs is 0.
    scale_ptr    [N], float32 or bfloat16.
    All else as in `finish`.
    """
    of_x = tl.load(x_scale_ptr + rows * stride_xs, mask=rows < M, other=0.0)
    of_w = tl.load(scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = acc.to(tl.float32) * (of_x[:, None] * of_w[None, :])
    y = finish(y, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    at = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def store_scaled_halves(
    acc,
    out_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    row,
    col,
    M,
    N,
    stride_xs,
    stride_rm,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`store_scaled` of the tile at (row, col): with HALVES, left half first, so that half as many registers do."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    rows = row + tl.arange(0, BLOCK_M)
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        store_scaled(
            left, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, rows, col + tl.arange(0, HALF), M, N,
            stride_xs, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        store_scaled(
            right, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, rows, col + HALF + tl.arange(0, HALF), M, N,
            stride_xs, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
        store_scaled(
            acc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, rows, col + tl.arange(0, 2 * HALF), M, N,
            stride_xs, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile (in rows, in columns of tiles) a program makes: GROUP_M rows of tiles are gone through column by
    column, so that programs that run together share both operands in the cache."""
    tall, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * wide)
    height = tl.minimum(tall - group * GROUP_M, GROUP_M)
    within = program - group * (GROUP_M * wide)
    return group * GROUP_M + within % height, within // height


def kind_of(spec: TensorSpec) -> str:
    """'int8', 'float8', or '' of a format that these kernels don't multiply."""
    if spec.format.kind == "int":
        return "int8" if spec.format.bits == 8 and not spec.has_zero_point else ""
    return "float8" if spec.code_dtype in _FLOAT8 else ""


def why_not_scaled(problem: Problem) -> str:
    """Why no kernel of this family takes the problem on any architecture; '' if one does."""
    if problem.op != "linear" or not problem.activations:
        return "it multiplies codes by codes"
    spec, x_spec = TensorSpec.parse(problem.weights), TensorSpec.parse(problem.activations)
    kind = kind_of(spec)
    if not kind or kind != kind_of(x_spec):
        return f"it wants int8 or float8 codes on both sides, without zero points, not {x_spec} × {spec}"
    if granules_along(problem.k, spec) > 1 or spec.has_tensor_scale:
        return f"it wants one scale a row of the weight, not {spec.granularity}"
    if x_spec.granularity.kind not in ("token", "tensor") or x_spec.scale != "float32":
        return f"it wants one float32 scale a row of x, or one of all, not {x_spec}"
    if kind == "int8" and problem.k > MOST_IN_INT32:
        return f"sums of {problem.k} products don't fit int32; it takes {MOST_IN_INT32}"
    return ""


def decode_for(problem: Problem, arch: Arch) -> int:
    """DECODE: float8 is widened to float16 where there are no matrix instructions on it, or only on the fnuz kind."""
    if kind_of(TensorSpec.parse(problem.weights)) == "int8":
        return AS_THEY_ARE
    if arch.backend == "hip":
        return BY_SHIFTS
    return AS_THEY_ARE if arch.float8 else AS_FLOAT16


def codes_of(operands: LinearOperands, decode: int = AS_THEY_ARE) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """x and weight as the kernels read them, and the constexprs X_DECODE, W_DECODE.

    The weight: [N, row of tiles] in its code dtype. Where float8 is decoded, uint8 instead of it.
    """
    x = operands.x if operands.x.stride(-1) == 1 or operands.in_features == 1 else operands.x.contiguous()
    w_dtype = TensorSpec.parse(operands.spec).code_dtype
    if decode == AS_THEY_ARE:
        return x, operands.tiles.view(w_dtype), {"X_DECODE": "", "W_DECODE": ""}
    names = {torch.float8_e4m3fn: "e4m3fn_shifted" if decode == BY_SHIFTS else "e4m3fn", torch.float8_e5m2: "e5m2"}
    return x.view(torch.uint8), operands.tiles, {"X_DECODE": names[x.dtype], "W_DECODE": names[w_dtype]}


def for_descriptor(codes: Tensor) -> Tensor:
    """Codes [R, C] of one byte each as a descriptor or a library reads them, a copy if need be: rows that begin at
    multiples of 16 bytes and don't overlap, which those of an expanded tensor do."""
    row = codes.stride(0)
    if row % ALIGNED or row < codes.shape[1] or codes.stride(1) != 1 or not is_aligned(codes):
        return codes.clone(memory_format=torch.contiguous_format)
    return codes


def scales_of(operands: LinearOperands) -> tuple[Tensor, Tensor, int]:
    """Scale of x, scale of the weight, and from one row's scale of x to the next: 0 where all share one."""
    assert operands.x_scale is not None, "codes come with a scale"
    shared = operands.x_scale.shape[0] == 1
    return operands.x_scale, operands.scale, 0 if shared else operands.x_scale.stride(0)


def epilogue_args(operands: LinearOperands) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(bias, residual, its stride over rows) and the constexprs of `finish`.

    No multiplication is fused with an addition, so that results have the bits of the reference.
    """
    residual = operands.residual
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    stride = 0 if residual is None else residual.stride(0)
    meta = epilogue_meta(operands.bias, residual, operands.activation)
    return (operands.bias, residual, stride), {**meta, "enable_fp_fusion": False}
