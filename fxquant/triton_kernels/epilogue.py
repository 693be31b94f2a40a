"""What every linear kernel does to a tile of results before it rounds and stores it: bias, activation, residual.

All in float32, as torch defines the functions. exp is 2**(x / ln 2), so that silu and gelu_tanh have a relative error
of at most (|x| + 8) * 2**-23; gelu has one of 8 * 2**-23 of |x|, for 1 + erf cancels where x is negative.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_MINUS_2_SQRT_2_OVER_PI = tl.constexpr(-1.5957691216057308)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def finish(
    y,
    bias_ptr,
    residual_ptr,
    rows,
    cols,
    M,
    N,
    stride_rm,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """activation(y + bias) + residual, float32 [BLOCK_M, BLOCK_N].

    y             float32 [BLOCK_M, BLOCK_N].
    bias_ptr      [N] of any float dtype; anything where HAS_BIAS is false.
    residual_ptr  [M, N] of any float dtype, stride (stride_rm, 1); anything where HAS_RESIDUAL is false.
    rows, cols    [BLOCK_M], [BLOCK_N]: which elements of [M, N] these are; those outside are not read.
    """
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if HAS_RESIDUAL:
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        at = residual_ptr + rows.to(tl.int64)[:, None] * stride_rm + cols[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation function of that name on float32 of any shape; '' is none."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "gelu":
        y = y * 0.5 * (1.0 + tl.erf(y * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)), which needs no tanh and does not cancel.
        y = y / (1.0 + tl.exp((y + y * y * y * _GELU_CUBIC) * _MINUS_2_SQRT_2_OVER_PI))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    else:
        tl.static_assert(ACTIVATION == "", "no such activation")
    return y


def epilogue_meta(bias: Any, residual: Any, activation: str) -> dict[str, Any]:
    """The constexprs of `finish` for those operands, as keywords of `launch`."""
    return {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation}
