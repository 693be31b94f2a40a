"""RMSNorm and LayerNorm of tiles of rows, in float32, for kernels that do something with the result."""

from __future__ import annotations

import triton
import triton.language as tl

NORMS = {"": 0, "rmsnorm": 1, "layernorm": 2}


@triton.jit
def tile_of(x_ptr, rows, cols, M, K, stride_x):
    """Values of x at rows [R] and cols [C] as float32 [R, C]; 0 outside of x."""
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    return tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _one_over_root(square, K, eps):
    """1 / sqrt(square / K + eps), each step rounded once; float32 [R]."""
    root = tl.math.sqrt_rn(tl.math.div_rn(square, tl.zeros(square.shape, tl.float32) + K) + eps)
    return tl.math.div_rn(tl.full(square.shape, 1.0, tl.float32), root)


@triton.jit
def moments_of_tile(values, cols, K, eps, NORM: tl.constexpr):
    """Of whole rows [R, C] the mean (0 for RMSNorm) and 1 / sqrt(mean square around it + eps), float32 [R]."""
    mean = tl.zeros([values.shape[0]], tl.float32)
    if NORM == 2:
        mean = tl.math.div_rn(tl.sum(values, 1), mean + K)
        values = tl.where((cols < K)[None, :], values - mean[:, None], 0.0)
    return mean, _one_over_root(tl.sum(values * values, 1), K, eps)


@triton.jit
def moments_of_rows(x_ptr, rows, M, K, stride_x, eps, NORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same of rows that are longer than a tile."""
    mean = tl.zeros(rows.shape, tl.float32)
    square = tl.zeros(rows.shape, tl.float32)
    if NORM == 2:
        for start in range(0, K, BLOCK_K):
            mean += tl.sum(tile_of(x_ptr, rows, start + tl.arange(0, BLOCK_K), M, K, stride_x), 1)
        mean = tl.math.div_rn(mean, tl.zeros(rows.shape, tl.float32) + K)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        values = tile_of(x_ptr, rows, cols, M, K, stride_x) - mean[:, None]
        values = tl.where((cols < K)[None, :], values, 0.0)
        square += tl.sum(values * values, 1)
    return mean, _one_over_root(square, K, eps)


@triton.jit
def normed(
    values, weight_ptr, bias_ptr, cols, mean, rstd, K, dtype: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What is quantized, float32 [R, C]: x, or x behind the norm, rounded to x's dtype; 0 in columns outside of x."""
    if NORM != 0:
        values = (values - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            values *= tl.load(weight_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            values += tl.load(bias_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
        values = tl.where((cols < K)[None, :], values.to(dtype).to(tl.float32), 0.0)
    return values
