"""quantize_dynamic, quantize_weight, dequantize, int8_quantize_per_token.

Codes have no gradient. That of an activation's scale is refused at backward, by name; codes and scale of a weight are
constants, so that keeping them never keeps the weight's graph alive.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.errors import GradientsNeedTraining, ShapeMismatch
from fxquant.numerics import decode, scale_shape
from fxquant.ops.checks import activation_spec, check_activation, check_devices, check_granularity
from fxquant.ops.library import declare, no_gradient
from fxquant.spec import TensorSpec


def quantize_dynamic(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """Quantize an activation by its own range.

    x [..., K] float32, bfloat16 or float16 -> codes like x, scale float32 [..., 1] (token) or [1, ..., 1] (tensor).
    """
    check_activation("fxquant.quantize_dynamic", x)
    codes, scale, _ = quantize(x, activation_spec("fxquant.quantize_dynamic", spec))
    return codes, scale


def _quantize_dynamic_fake(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    check_activation("fxquant.quantize_dynamic", x)
    parsed = activation_spec("fxquant.quantize_dynamic", spec)
    return _codes_and_scale_like(x, parsed)


def int8_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_dynamic(x, "int8/token"): x [..., K] -> codes int8 [..., K], scale float32 [..., 1]."""
    return quantize_dynamic(x, "int8/token")


def _int8_quantize_per_token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return _quantize_dynamic_fake(x, "int8/token")


def quantize_weight(w: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight: codes like w, scale float32, zero_point uint8 like scale (affine) or empty (symmetric)."""
    parsed = _weight_spec(w, spec)
    codes, scale, zero_point = quantize(w, parsed)
    return codes, scale, zero_point


def _quantize_weight_fake(w: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = _weight_spec(w, spec)
    codes, scale = _codes_and_scale_like(w, parsed)
    zero_shape = scale.shape if parsed.scheme == "affine" else [0]
    return codes, scale, w.new_empty(zero_shape, dtype=torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, dtype: torch.dtype) -> Tensor:
    """(codes - zero_point) * scale in float32, then `dtype`; in the shape of codes, contiguous."""
    return decode(codes, scale, zero_point, _dequantize_spec(codes, scale, zero_point, spec, dtype), dtype)


def _dequantize_fake(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, dtype: torch.dtype) -> Tensor:
    _dequantize_spec(codes, scale, zero_point, spec, dtype)
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def _codes_and_scale_like(x: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=spec.code_dtype, device=x.device)
    return codes, torch.empty(scale_shape(x.shape, spec.granularity), dtype=torch.float32, device=x.device)


def _weight_spec(w: Tensor, spec: str) -> TensorSpec:
    parsed = TensorSpec.parse(spec)
    if not w.dtype.is_floating_point:
        raise ShapeMismatch("fxquant.quantize_weight", f"a weight of dtype {w.dtype}", "a float dtype")
    check_granularity("fxquant.quantize_weight", w, parsed)
    return parsed


def _dequantize_spec(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, dtype: torch.dtype
) -> TensorSpec:
    op, parsed = "fxquant.dequantize", TensorSpec.parse(spec)
    check_granularity(op, codes, parsed)
    check_devices(op, codes=codes, scale=scale, zero_point=zero_point)
    if codes.dtype != parsed.code_dtype:
        raise ShapeMismatch(op, f"codes of dtype {codes.dtype}", f"{parsed.code_dtype} for spec {parsed}")
    wanted = scale_shape(codes.shape, parsed.granularity)
    if scale.dtype != torch.float32 or list(scale.shape) != wanted:
        raise ShapeMismatch(
            op, f"scale of shape {list(scale.shape)} and dtype {scale.dtype}", f"float32 of shape {wanted}"
        )
    if parsed.scheme == "affine" and (zero_point is None or zero_point.shape != scale.shape):
        met = "no zero_point" if zero_point is None else f"zero_point of shape {list(zero_point.shape)}"
        raise ShapeMismatch(op, met, f"one of shape {wanted} for spec {parsed}")
    if not dtype.is_floating_point:
        raise ShapeMismatch(op, f"dtype {dtype}", "a float dtype")
    return parsed


def _constants(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _refuse(op: str) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise GradientsNeedTraining(f"fxquant.{op}")

    return backward


declare(
    "quantize_dynamic(Tensor x, str spec) -> (Tensor codes, Tensor scale)",
    reference=quantize_dynamic,
    fake=_quantize_dynamic_fake,
    backward=_refuse("quantize_dynamic"),
)
declare(
    "int8_quantize_per_token(Tensor x) -> (Tensor codes, Tensor scale)",
    reference=int8_quantize_per_token,
    fake=_int8_quantize_per_token_fake,
    backward=_refuse("int8_quantize_per_token"),
)
declare(
    "quantize_weight(Tensor w, str spec) -> (Tensor codes, Tensor scale, Tensor zero_point)",
    reference=quantize_weight,
    fake=_quantize_weight_fake,
    backward=no_gradient,
    setup_context=_constants,
)
declare(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, ScalarType dtype) -> Tensor",
    reference=dequantize,
    fake=_dequantize_fake,
    backward=_refuse("dequantize"),
)
