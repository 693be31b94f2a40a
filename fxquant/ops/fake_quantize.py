"""fake_quantize, fake_quantize_weight: what a tensor becomes by being quantized and dequantized.

Bit-equal to dequantize(quantize_dynamic(x)), and to dequantize(quantize_weight(w)). The gradients are those of a copy:
straight through the rounding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.errors import ShapeMismatch
from fxquant.numerics import decode
from fxquant.ops.checks import ACTIVATION_DTYPES, activation_spec, check_activation, check_granularity
from fxquant.ops.library import LIBRARY, declare
from fxquant.spec import CHANNEL, INT8, TOKEN, TensorSpec


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


def fake_quantize_weight(w: Tensor, spec: str, algorithm: str = "auto") -> Tensor:
    """w rounded to what `spec` can say of it as a matrix [w.shape[0], -1]; contiguous, in the shape and dtype of w.

    w of any float dtype, at least one dimension; that of one, [K], is a single row. spec, algorithm: as quantize_weight
    takes them. A granule that holds NaN or infinity is NaN throughout.
    """
    matrix, parsed = _check_weight(w, spec)
    codes, scale, zero_point, tensor_scale = quantize(matrix, parsed, algorithm)
    return decode(codes, scale, zero_point, parsed, w.dtype, tensor_scale).view(w.shape)


def _fake_quantize_weight_on_cpu(w: Tensor, spec: str, algorithm: str = "auto") -> Tensor:
    matrix, parsed = _check_weight(w, spec)
    if w.dtype not in ACTIVATION_DTYPES or algorithm not in ("auto", "absmax") or not _rounds_as_activation(parsed):
        return fake_quantize_weight(w, spec, algorithm)
    by_row = str(replace(parsed, granularity=TOKEN)) if parsed.granularity == CHANNEL else spec
    return torch.ops.fxquant.fake_quantize.default(matrix, by_row).view(w.shape)


def _fake_quantize_weight_fake(w: Tensor, spec: str, algorithm: str = "auto") -> Tensor:
    _check_weight(w, spec)
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


def _check_weight(w: Tensor, text: str) -> tuple[Tensor, TensorSpec]:
    op, spec = "fxquant.fake_quantize_weight", TensorSpec.parse(text)
    if not w.dtype.is_floating_point or w.dim() == 0:
        met = f"a weight of {w.dim()} dimensions and dtype {w.dtype}"
        raise ShapeMismatch(op, met, "a float dtype and at least one dimension")
    matrix = w.reshape(w.shape[0] if w.dim() > 1 else 1, math.prod(w.shape[1:]) if w.dim() > 1 else w.shape[0])
    check_granularity(op, matrix, spec)
    return matrix, spec


def _rounds_as_activation(spec: TensorSpec) -> bool:
    """Whether the kernels of fake_quantize know the format: each row of the matrix is a token."""
    known = (spec.format == INT8 or spec.format.kind == "float") and spec.scheme == "symmetric"
    by_row = spec.granularity == CHANNEL or spec.granularity.kind in ("tensor", "group")
    return known and by_row and spec.scale not in ("bfloat16", "stepped")


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


def _straight_through_weight(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


declare(
    "fake_quantize(Tensor x, str spec) -> Tensor",
    reference=fake_quantize,
    fake=_fake_quantize_fake,
    backward=_straight_through,
)
declare(
    'fake_quantize_weight(Tensor w, str spec, str algorithm="auto") -> Tensor',
    reference=fake_quantize_weight,
    fake=_fake_quantize_weight_fake,
    backward=_straight_through_weight,
)
# By way of another op: it has a kernel, or none, and is bit-equal either way.
LIBRARY.impl("fake_quantize_weight", _fake_quantize_weight_on_cpu, "CPU")
