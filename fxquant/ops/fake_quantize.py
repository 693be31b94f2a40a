"""fake_quantize: what an activation becomes by being quantized and dequantized, without codes in between.

Bit-equal to dequantize(quantize_dynamic(x)). The gradient is that of a copy: straight through the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import decode
from fxquant.ops.checks import activation_spec, check_activation
from fxquant.ops.library import declare


def fake_quantize(x: Tensor, spec: str) -> Tensor:
    """x [..., K] float32, bfloat16 or float16, rounded to what `spec` can say of it; contiguous, in x's dtype.

    spec: int8 or a float format, symmetric, per tensor, token, sample or group. A granule that holds NaN or infinity is
    NaN throughout.
    """
    parsed = _check(x, spec)
    codes, scale, zero_point, tensor_scale = quantize(x, parsed)
    return decode(codes, scale, zero_point, parsed, x.dtype, tensor_scale)


def _fake_quantize_fake(x: Tensor, spec: str) -> Tensor:
    _check(x, spec)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check(x: Tensor, spec: str) -> Any:
    check_activation("fxquant.fake_quantize", x)
    return activation_spec("fxquant.fake_quantize", x, spec)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


declare(
    "fake_quantize(Tensor x, str spec) -> Tensor",
    reference=fake_quantize,
    fake=_fake_quantize_fake,
    backward=_straight_through,
)
