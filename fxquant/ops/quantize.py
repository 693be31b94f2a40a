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
from fxquant.numerics import Codes, decode
from fxquant.numerics.held import held_dtype
from fxquant.ops.checks import (
    activation_spec,
    check_activation,
    check_devices,
    check_granularity,
    check_scale,
    check_tensor_scale,
)
from fxquant.ops.library import declare, no_gradient
from fxquant.spec import TensorSpec


def quantize_dynamic(x: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize an activation by its own range.

    x [..., K] float32, bfloat16 or float16 -> codes like x; scale in the shape of the granularity and the dtype of the
    spec; tensor_scale float32 [1, ..., 1], or empty where the spec has none.
    """
    check_activation("fxquant.quantize_dynamic", x)
    codes, scale, _, tensor_scale = quantize(x, activation_spec("fxquant.quantize_dynamic", x, spec))
    return codes, scale, tensor_scale


def _quantize_dynamic_fake(x: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    check_activation("fxquant.quantize_dynamic", x)
    codes, scale, _, tensor_scale = codes_like(x, activation_spec("fxquant.quantize_dynamic", x, spec))
    return codes, scale, tensor_scale


def int8_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_dynamic(x, "int8/token"): x [..., K] -> codes int8 [..., K], scale float32 [..., 1]."""
    return quantize_dynamic(x, "int8/token")[:2]


def _int8_quantize_per_token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return _quantize_dynamic_fake(x, "int8/token")[:2]


def quantize_weight(w: Tensor, spec: str, algorithm: str = "auto") -> Codes:
    """Quantize a weight by the algorithm of that name (see `fxquant.algorithms`).

    w of any float dtype -> codes like w; scale and zero_point in the shape of the granularity; tensor_scale.
    What a spec does not have is empty. Dtypes: see `fxquant.numerics.Codes`.
    """
    return quantize(w, _weight_spec(w, spec), algorithm)


def _quantize_weight_fake(w: Tensor, spec: str, algorithm: str = "auto") -> Codes:
    return codes_like(w, _weight_spec(w, spec))


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """The values that codes stand for, computed in float32 as `fxquant.numerics.decode` says, then rounded to `dtype`.

    Returns the shape of codes, contiguous.
    """
    parsed = _dequantize_spec(codes, scale, zero_point, spec, dtype, tensor_scale)
    return decode(codes, scale, zero_point, parsed, dtype, tensor_scale)


def _dequantize_fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    _dequantize_spec(codes, scale, zero_point, spec, dtype, tensor_scale)
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def codes_like(x: Tensor, spec: TensorSpec) -> Codes:
    """Empty codes, scale, zero point and tensor scale of x in that spec: what a fake gives."""
    shape = spec.granularity.scale_shape(x.shape)
    zero_dtype = spec.scale_dtype if spec.scheme == "shift" else torch.uint8
    return Codes(
        torch.empty(x.shape, dtype=held_dtype(spec.code_dtype, x.device), device=x.device),
        torch.empty(shape, dtype=held_dtype(spec.scale_dtype, x.device), device=x.device),
        torch.empty(shape if spec.has_zero_point else [0], dtype=zero_dtype, device=x.device),
        torch.empty([1] * x.dim() if spec.has_tensor_scale else [0], dtype=torch.float32, device=x.device),
    )


def _weight_spec(w: Tensor, spec: str) -> TensorSpec:
    parsed = TensorSpec.parse(spec)
    if not w.dtype.is_floating_point:
        raise ShapeMismatch("fxquant.quantize_weight", f"a weight of dtype {w.dtype}", "a float dtype")
    check_granularity("fxquant.quantize_weight", w, parsed)
    return parsed


def _dequantize_spec(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    dtype: torch.dtype,
    tensor_scale: Tensor | None,
) -> TensorSpec:
    op, parsed = "fxquant.dequantize", TensorSpec.parse(spec)
    check_granularity(op, codes, parsed)
    check_devices(op, codes=codes, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale)
    if codes.dtype != held_dtype(parsed.code_dtype, codes.device):
        raise ShapeMismatch(op, f"codes of dtype {codes.dtype}", f"{parsed.code_dtype} for spec {parsed}")
    check_scale(op, codes, scale, parsed)
    if parsed.has_zero_point and (zero_point is None or zero_point.shape != scale.shape):
        met = "no zero_point" if zero_point is None else f"zero_point of shape {list(zero_point.shape)}"
        raise ShapeMismatch(op, met, f"one of shape {list(scale.shape)} for spec {parsed}")
    check_tensor_scale(op, codes, tensor_scale, parsed)
    if not dtype.is_floating_point:
        raise ShapeMismatch(op, f"dtype {dtype}", "a float dtype")
    return parsed


def _constants(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def refuse(op: str) -> Any:
    """The backward of an op that has none: it names the op and says what to do."""

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise GradientsNeedTraining(f"fxquant.{op}")

    return backward


declare(
    "quantize_dynamic(Tensor x, str spec) -> (Tensor codes, Tensor scale, Tensor tensor_scale)",
    reference=quantize_dynamic,
    fake=_quantize_dynamic_fake,
    backward=refuse("quantize_dynamic"),
)
declare(
    "int8_quantize_per_token(Tensor x) -> (Tensor codes, Tensor scale)",
    reference=int8_quantize_per_token,
    fake=_int8_quantize_per_token_fake,
    backward=refuse("int8_quantize_per_token"),
)
declare(
    'quantize_weight(Tensor w, str spec, str algorithm="auto") '
    "-> (Tensor codes, Tensor scale, Tensor zero_point, Tensor tensor_scale)",
    reference=quantize_weight,
    fake=_quantize_weight_fake,
    backward=no_gradient,
    setup_context=_constants,
)
declare(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, ScalarType dtype, "
    "Tensor? tensor_scale=None) -> Tensor",
    reference=dequantize,
    fake=_dequantize_fake,
    backward=refuse("dequantize"),
)
