"""quantize_static: codes of an activation under a scale that was recorded, for products of codes with codes.

The rounding is that of fake_quantize_static, and of int8_linear_static.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import InvalidSpec, ShapeMismatch
from fxquant.numerics.held import held_dtype
from fxquant.ops.checks import activation_spec, check_activation, check_devices
from fxquant.ops.library import declare
from fxquant.ops.quantize import refuse
from fxquant.spec import TENSOR, TensorSpec

_OP = "fxquant.quantize_static"


def quantize_static(x: Tensor, scale: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """x [..., K] float32, bfloat16 or float16 -> codes like x, and the scale of each row, float32 [..., 1].

    scale float32 [] or [1]; spec int8/tensor or a float format per tensor. All rows have the one scale; a row with a
    value that is not finite has NaN, so that a product with it is NaN as a float one would be.
    """
    parsed = check_static(x, scale, spec)
    scales = numerics.given_scales(scale.reshape(()))
    codes = numerics.encode(x, scales, parsed).codes
    return codes, torch.where(x.isfinite().all(-1, keepdim=True), scales.scale, math.nan)


def _quantize_static_fake(x: Tensor, scale: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    parsed = check_static(x, scale, spec)
    codes = torch.empty(x.shape, dtype=held_dtype(parsed.code_dtype, x.device), device=x.device)
    return codes, torch.empty([*x.shape[:-1], 1], dtype=torch.float32, device=x.device)


def check_static(x: Tensor, scale: Tensor, text: str) -> TensorSpec:
    """The operands of quantize_static fit together. Returns the spec of the codes."""
    check_activation(_OP, x)
    spec = activation_spec(_OP, x, text)
    if spec.granularity != TENSOR or spec.scale != "float32":
        raise InvalidSpec(text, f"{_OP} takes one float32 scale for the whole tensor, such as int8/tensor")
    check_devices(_OP, x=x, scale=scale)
    if scale.dtype != torch.float32 or list(scale.shape) not in ([], [1]):
        met = f"scale of shape {list(scale.shape)} and dtype {scale.dtype}"
        raise ShapeMismatch(_OP, met, "float32 of shape [] or [1], one scale for the whole activation,")
    return spec


declare(
    "quantize_static(Tensor x, Tensor scale, str spec) -> (Tensor codes, Tensor scale)",
    reference=quantize_static,
    fake=_quantize_static_fake,
    backward=refuse("quantize_static"),
)
