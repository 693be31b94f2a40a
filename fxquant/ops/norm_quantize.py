"""norm_quantize: a norm over the last axis, and the codes of what it gives, in one pass over x.

The norm is computed in float32 and rounded to x's dtype, as aten.rms_norm and aten.layer_norm round; its sums may be
added in another order than theirs, so that a value, and a code, may differ by one rounding. What follows is
quantize_dynamic of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import InvalidSpec, ShapeMismatch
from fxquant.ops.checks import ACTIVATION_DTYPES, activation_spec, check_activation, check_devices
from fxquant.ops.library import declare
from fxquant.ops.quantize import codes_like, quantize_dynamic, refuse
from fxquant.spec import TensorSpec

NORMS = ("rmsnorm", "layernorm")
_OP = "fxquant.norm_quantize"


def norm_quantize(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and tensor_scale of the normalized x, as quantize_dynamic makes them.

    x [..., K] float32, bfloat16 or float16; norm 'rmsnorm' or 'layernorm'; weight [K] or None; bias [K] or None, of a
    layernorm only; eps of the norm.
    """
    check_norm(x, norm, weight, bias, spec)
    return quantize_dynamic(normalized(x, norm, weight, bias, eps), spec)


def _norm_quantize_fake(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, _, tensor_scale = codes_like(x, check_norm(x, norm, weight, bias, spec))
    return codes, scale, tensor_scale


def normalized(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of x over its last axis, in float32, rounded to x's dtype."""
    wide, width = x.float(), [x.shape[-1]]
    scale = None if weight is None else weight.float()
    if norm == "rmsnorm":
        return torch.nn.functional.rms_norm(wide, width, scale, eps).to(x.dtype)
    shift = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(wide, width, scale, shift, eps).to(x.dtype)


def check_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, text: str) -> TensorSpec:
    """The operands of norm_quantize fit together. Returns the spec of the codes."""
    check_activation(_OP, x)
    check_devices(_OP, x=x, weight=weight, bias=bias)
    if norm not in NORMS or (norm == "rmsnorm" and bias is not None):
        raise InvalidSpec(norm, f"{_OP} takes the norms {', '.join(map(repr, NORMS))}; a bias only of a layernorm")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (list(t.shape) != [x.shape[-1]] or t.dtype not in ACTIVATION_DTYPES):
            raise ShapeMismatch(_OP, f"{name} of shape {list(t.shape)} and dtype {t.dtype}", f"float [{x.shape[-1]}]")
    return activation_spec(_OP, x, text)


declare(
    "norm_quantize(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, str spec) -> "
    "(Tensor codes, Tensor scale, Tensor tensor_scale)",
    reference=norm_quantize,
    fake=_norm_quantize_fake,
    backward=refuse("norm_quantize"),
)
