"""Products of two sides in blocks with a scale of one byte each: OCP MX (mxfp8, mxfp4, mixed) and NVFP4.

`tl.dot_scaled` multiplies codes and scales together, in one instruction where the target has block-scaled matrix
products (tcgen05 kind::mxf8f6f4, mxf4, mxf4nvf4 of sm100). Triton 3.9 takes that instruction only where the left side
of the product has at least 128 rows, the right one at least 16 columns, and 4 or 8 warps work on it; else it widens
both sides to bfloat16 in registers. So with few rows of x the product is turned around: the weight stands left. Other
targets decode x and the weight instead (`coded_mm`): for them `why_not` says no.

Sums are those of the matrix unit, in float32; then y * (x_tensor_scale * tensor_scale), bias, activation, residual, and
one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.spec import NumberFormat, TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.epilogue import epilogue_meta, finish
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import launch, output
from fxquant.triton_kernels.operands import LinearOperands

_NAME = "mx_mm"
_FORMATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "fp4_e2m1": "e2m1"}
LEAST_LEFT, LEAST_RIGHT = 128, 16


@triton.jit
def _block(ptr, rows, count, stride, first, width, LAST: tl.constexpr, EVEN: tl.constexpr):
    """Rows [R] of a matrix and the LAST columns from `first`, [R, LAST]; 0 outside of [count, width]."""
    cols = first + tl.arange(0, LAST)
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if EVEN:
        found = tl.load(at, mask=(rows < count)[:, None], other=0)
    else:
        found = tl.load(at, mask=(rows < count)[:, None] & (cols < width)[None, :], other=0)
    return found


@triton.jit
def mx_mm(
    x_ptr,  # [M, x_bytes] uint8: float8, or two fp4 a byte, low half first; stride_x between rows
    x_scale_ptr,  # [M, G] uint8; contiguous
    w_ptr,  # [N, w_bytes] as x; contiguous
    w_scale_ptr,  # [N, G] as x_scale; contiguous
    x_whole_ptr,  # [1] float32: the tensor scale of x (NVFP4); or None
    w_whole_ptr,  # [1] or [N] float32: that of the weight, or of its rows; or None
    bias_ptr,  # [N] any float; or None
    residual_ptr,  # [M, N] of any float, stride_r between rows; or None
    y_ptr,  # [M, N] float16, bfloat16 or float32; contiguous
    M, N, K, x_bytes, w_bytes, G, stride_x, stride_r,
    X_FORMAT: tl.constexpr, W_FORMAT: tl.constexpr,  # 'e4m3', 'e5m2' or 'e2m1'
    X_PACK: tl.constexpr, W_PACK: tl.constexpr,  # codes of a byte
    BLOCK: tl.constexpr, E4M3_SCALES: tl.constexpr,  # codes under one scale, and its kind
    WHOLES: tl.constexpr,  # tensor scales: 0 none, 1 one of each side, 2 one for each row of the weight
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    TURNED: tl.constexpr,  # the weight stands left
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] a program; GROUP_M tiles of rows go together along N, to meet in the cache."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (GROUP_M * tiles_n)
    high = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = tl.program_id(0) - band * GROUP_M * tiles_n
    rows = (band * GROUP_M + within % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = within // high * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros([BLOCK_N, BLOCK_M] if TURNED else [BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        x = _block(x_ptr, rows, M, stride_x, step * (BLOCK_K // X_PACK), x_bytes, BLOCK_K // X_PACK, EVEN_K)
        w = _block(w_ptr, cols, N, w_bytes, step * (BLOCK_K // W_PACK), w_bytes, BLOCK_K // W_PACK, EVEN_K)
        xs = _block(x_scale_ptr, rows, M, G, step * (BLOCK_K // BLOCK), G, BLOCK_K // BLOCK, EVEN_K)
        ws = _block(w_scale_ptr, cols, N, G, step * (BLOCK_K // BLOCK), G, BLOCK_K // BLOCK, EVEN_K)
        if E4M3_SCALES:  # of uint8 scales `tl.dot_scaled` says e8m0
            xs, ws = xs.to(tl.float8e4nv, bitcast=True), ws.to(tl.float8e4nv, bitcast=True)
        if TURNED:
            y = tl.dot_scaled(w, ws, W_FORMAT, x.T, xs, X_FORMAT, y)
        else:
            y = tl.dot_scaled(x, xs, X_FORMAT, w.T, ws, W_FORMAT, y)
    if TURNED:
        y = y.T
    if WHOLES == 1:
        y *= tl.load(x_whole_ptr) * tl.load(w_whole_ptr)
    elif WHOLES == 2:
        y *= (tl.load(x_whole_ptr) * tl.load(w_whole_ptr + cols, mask=cols < N, other=0.0))[None, :]
    y = finish(y, bias_ptr, residual_ptr, rows, cols, M, N, stride_r, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """y [M, N] in operands.dtype; the operands in the storage form (see `LinearOperands`)."""
    spec, x_spec = TensorSpec.parse(operands.spec), TensorSpec.parse(operands.x_spec)
    x, x_scale, n, k = operands.x, operands.x_scale, operands.out_features, operands.in_features
    assert x_scale is not None
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    x_scale, scale, tiles = x_scale.contiguous(), operands.scale.contiguous(), operands.tiles.contiguous()
    m, block_m, block_n = x.shape[0], config["BLOCK_M"], config["BLOCK_N"]
    y = output([m, n], operands.dtype, x.device)
    if y.numel() == 0:
        return y
    residual, whole = operands.residual, operands.tensor_scale
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    launch(
        mx_mm,
        (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        x.view(torch.uint8), x_scale.view(torch.uint8), tiles, scale.view(torch.uint8),
        operands.x_tensor_scale, whole, operands.bias, residual, y,
        m, n, k, x.shape[1], tiles.shape[1], scale.shape[1], x.stride(0),
        0 if residual is None else residual.stride(0),
        X_FORMAT=_FORMATS[x_spec.format.name], W_FORMAT=_FORMATS[spec.format.name],
        X_PACK=_pack(x_spec.format), W_PACK=_pack(spec.format), BLOCK=spec.granularity.size,
        E4M3_SCALES=spec.scale == "e4m3",
        WHOLES=0 if whole is None else 1 if whole.shape[0] == 1 else 2,
        **epilogue_meta(operands.bias, residual, operands.activation),
        EVEN_K=k % config["BLOCK_K"] == 0, TURNED=block_m < LEAST_LEFT,
        **config.meta,
    )  # fmt: skip
    return y


def _pack(number: NumberFormat) -> int:
    return 2 if number.bits == 4 else 1


def _why_not(problem: Problem, arch: Arch) -> str:
    if problem.op != "linear" or not problem.activations:
        return "it multiplies codes of both sides"
    spec, x_spec = TensorSpec.parse(problem.weights), TensorSpec.parse(problem.activations)
    if not scaled_by_blocks(spec, x_spec):
        return f"it multiplies block-scaled floats (mxfp8, mxfp4, nvfp4), not {x_spec} with {spec}"
    if spec.scale != x_spec.scale or spec.granularity != x_spec.granularity:
        return f"both sides need the same blocks and scales, not {x_spec} and {spec}"
    wanted = 32 if spec.scale == "e8m0" else 16
    if spec.granularity.size != wanted:
        return f"blocks with {spec.scale} scales have {wanted} codes, not {spec.granularity.size}"
    if strange := [s for s in (spec, x_spec) if s.format.name not in _FORMATS]:
        return f"it multiplies float8_e4m3fn, float8_e5m2 and fp4_e2m1, not {strange[0].format}"
    if spec.scale == "e4m3" and {spec.format.name, x_spec.format.name} != {"fp4_e2m1"}:
        return f"under e4m3 scales both sides are fp4_e2m1, not {x_spec.format} and {spec.format}"
    if not arch.scaled_dot:
        return f"{arch} has no matrix products of block-scaled floats: both sides are decoded instead"
    return ""


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    """128 rows of the weight stand left up to 64 rows of x; then 128 rows of x, and as wide a tile as there is work."""
    narrow = all(TensorSpec.parse(text).format.bits == 4 for text in (problem.weights, problem.activations))
    k = 256 if narrow else 128
    if problem.m <= 64:
        m = max(LEAST_RIGHT, triton.next_power_of_2(problem.m))
        tiles = [(m, 128, k, 1, 4, 4), (m, 128, 2 * k, 1, 4, 3), (m, 128, k, 1, 4, 6), (m, 128, k // 2, 1, 4, 4)]
    elif problem.m <= 512:
        tiles = [(128, 64, k, 8, 4, 4), (128, 128, k, 8, 4, 4), (64, 128, k, 8, 4, 4), (128, 64, 2 * k, 8, 4, 3)]
    else:
        tiles = [
            (128, 256, k, 8, 8, 3),
            (128, 128, k, 8, 4, 4),
            (128, 128, 2 * k, 8, 8, 3),
            (128, 256, k // 2, 8, 8, 4),
        ]
    return tuple(MX_MM.config(*tile) for tile in tiles)


MX_MM = TritonKernel(
    name=_NAME,
    op="linear",
    fields=("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages"),
    why_not=_why_not,
    candidates=_candidates,
    run=run,
    summary="block-scaled floats (mxfp8, mxfp4, nvfp4) on both sides, by scaled matrix instructions",
)
