"""int8_pack, int8_unpack, and the linears over packed int8 weights.

y = float(sum of code products, exact in int32) * (x_scale * scale) [+ bias], in float32, then rounded once to the
output dtype. Against float64: |error| <= 3u |x_scale * scale * sum| + u |y| (+ u_out |y|), u = 2**-24. The gradient to
x is that of a linear over the dequantized weight: exact for weight_only, straight through the rounding of x for the
dynamic one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import GradientsNeedTraining, ShapeMismatch
from fxquant.numerics import int8_matmul, matmul_float32, pack_int8, packed_shape, unpack_int8
from fxquant.ops.around import (
    AFTER,
    BEFORE,
    check_after,
    check_before,
    columns_of,
    finished,
    plain_gradients,
    prepared,
)
from fxquant.ops.checks import (
    ACTIVATION_DTYPES,
    check_activation,
    check_codes,
    check_devices,
    check_linear,
    check_packed,
)
from fxquant.ops.library import declare, no_gradient
from fxquant.ops.quantize import int8_quantize_per_token


def int8_pack(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] -> packed int8, flat, in the layout of numerics.packing."""
    check_codes("fxquant.int8_pack", "codes", codes, 2)
    return pack_int8(codes)


def _int8_pack_fake(codes: Tensor) -> Tensor:
    check_codes("fxquant.int8_pack", "codes", codes, 2)
    return codes.new_empty(packed_shape(*codes.shape))


def int8_unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of int8_pack: codes int8 [out_features, in_features]."""
    check_packed("fxquant.int8_unpack", packed, out_features, in_features)
    return unpack_int8(packed, out_features, in_features)


def _int8_unpack_fake(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    check_packed("fxquant.int8_unpack", packed, out_features, in_features)
    return packed.new_empty([out_features, in_features])


def int8_linear_dynamic(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Linear of x, quantized per token here, with packed int8 weights.

    x [..., K] float32, bfloat16 or float16; scale float32 [N, 1] or [N]; bias [N] or None. Returns [..., N] in x's
    dtype. `isa` picks a kernel's instruction set, for tests; the reference has none. `prologue`, `by`, `shift` and
    `eps` say what x goes through first, `activation` and `residual` [..., N] what the result does. An activation of one
    half of the columns, times the other half ('silu_first'), gives [..., N / 2], N a multiple of 128: see
    `fxquant.ops.around`.
    """
    _check_floats("int8_linear_dynamic", x, packed, scale, bias, in_features, residual, activation, prologue, by, shift)
    codes, x_scale = int8_quantize_per_token(prepared(x, prologue, by, shift, eps))
    return int8_linear(codes, x_scale, packed, scale, bias, in_features, x.dtype, isa, residual, activation)


def _fake_of(op: str) -> Callable[..., Tensor]:
    """The fake of a linear over float x."""

    def fake(
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        in_features: int,
        isa: int = 0,
        residual: Tensor | None = None,
        activation: str = "",
        prologue: str = "",
        by: Tensor | None = None,
        shift: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        out_features = _check_floats(op, x, packed, scale, bias, in_features, residual, activation, prologue, by, shift)
        return x.new_empty([*x.shape[:-1], columns_of(out_features, activation)])

    return fake


def int8_linear(
    codes: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Linear of activations already quantized, codes int8 [..., K] and x_scale float32 [..., 1].

    All else as in int8_linear_dynamic. Returns [..., N] in `dtype`.
    """
    out_features = _check_quantized(codes, x_scale, packed, scale, bias, in_features, dtype)
    check_after("fxquant.int8_linear", codes, out_features, residual, activation, dtype)
    weight_codes = unpack_int8(packed, out_features, in_features)
    total = int8_matmul(codes.reshape(_rows(codes), in_features), weight_codes)
    y = total.float() * (x_scale.reshape(_rows(codes), 1) * scale.reshape(1, out_features))
    return finished(y, bias, residual, activation, dtype, [*codes.shape[:-1], columns_of(out_features, activation)])


def _int8_linear_fake(
    codes: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    out_features = _check_quantized(codes, x_scale, packed, scale, bias, in_features, dtype)
    check_after("fxquant.int8_linear", codes, out_features, residual, activation, dtype)
    return codes.new_empty([*codes.shape[:-1], columns_of(out_features, activation)], dtype=dtype)


def int8_linear_weight_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Linear of float x with packed int8 weights: sums of x * code, times scale.

    A kernel may round x to 2**-22 of its row's largest value, one of 16 bits to 2**-15, and sum up exactly:
    docs/numbers.md. All else as in int8_linear_dynamic.
    """
    op = "int8_linear_weight_only"
    out_features = _check_floats(op, x, packed, scale, bias, in_features, residual, activation, prologue, by, shift)
    weight_codes = unpack_int8(packed, out_features, in_features)
    x = prepared(x, prologue, by, shift, eps)
    y = matmul_float32(x.reshape(_rows(x), in_features), weight_codes) * scale.reshape(1, out_features)
    return finished(y, bias, residual, activation, x.dtype, [*x.shape[:-1], columns_of(out_features, activation)])


def _rows(x: Tensor) -> int:
    # reshape(-1, K) can't tell the rows of an empty tensor.
    return x.shape[:-1].numel()


def _check_floats(
    op: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    residual: Tensor | None,
    activation: str,
    prologue: str,
    by: Tensor | None,
    shift: Tensor | None,
) -> int:
    """The operands of a linear over float x fit together. Returns N."""
    op = f"fxquant.{op}"
    check_activation(op, x)
    out_features = check_linear(op, x, packed, scale, bias, in_features)
    check_before(op, x, prologue, by, shift)
    check_after(op, x, out_features, residual, activation, x.dtype)
    return out_features


def _check_quantized(
    codes: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
) -> int:
    op = "fxquant.int8_linear"
    check_codes(op, "codes", codes)
    check_devices(op, codes=codes, x_scale=x_scale)
    wanted = [*codes.shape[:-1], 1]
    if x_scale.dtype != torch.float32 or list(x_scale.shape) != wanted:
        met = f"x_scale of shape {list(x_scale.shape)} and dtype {x_scale.dtype}"
        raise ShapeMismatch(op, met, f"float32 of shape {wanted}, one scale a token,")
    if dtype not in ACTIVATION_DTYPES:
        raise ShapeMismatch(op, f"output dtype {dtype}", "float32, bfloat16 or float16")
    return check_linear(op, codes, packed, scale, bias, in_features)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, bias, in_features, _ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.in_features, ctx.dtype = in_features, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(op: str) -> dict[str, Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[2]:
            raise GradientsNeedTraining(f"fxquant.{op}, weight scale")
        packed, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad.float() @ dequantized(packed, scale, ctx.in_features)).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad, ctx.bias_dtype)
        return grad_x, None, None, grad_bias

    setup_context, of_all = plain_gradients(op, 6, 12, _save_weight, backward)
    return {"backward": of_all, "setup_context": setup_context}


def dequantized(packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """The weight float32 [N, in_features] that packed int8 codes stand for."""
    codes = torch.ops.fxquant.int8_unpack.default(packed, scale.shape[0], in_features)
    return codes.float() * scale.reshape(-1, 1)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over all rows of grad [..., N]."""
    return grad.float().reshape(-1, grad.shape[-1]).sum(0).to(dtype)


def _refuse_int8_linear(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    raise GradientsNeedTraining("fxquant.int8_linear")


declare(
    "int8_pack(Tensor codes) -> Tensor packed",
    reference=int8_pack,
    fake=_int8_pack_fake,
    backward=no_gradient,
)
declare(
    "int8_unpack(Tensor packed, int out_features, int in_features) -> Tensor codes",
    reference=int8_unpack,
    fake=_int8_unpack_fake,
    backward=no_gradient,
)
declare(
    "int8_linear_dynamic(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int in_features, int isa=0, "
    f"{AFTER}, {BEFORE}) -> Tensor",
    reference=int8_linear_dynamic,
    fake=_fake_of("int8_linear_dynamic"),
    **_gradients("int8_linear_dynamic"),
)
declare(
    "int8_linear(Tensor codes, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, int in_features, "
    f"ScalarType dtype, int isa=0, {AFTER}) -> Tensor",
    reference=int8_linear,
    fake=_int8_linear_fake,
    backward=_refuse_int8_linear,
)
declare(
    "int8_linear_weight_only(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int in_features, int isa=0, "
    f"{AFTER}, {BEFORE}) -> Tensor",
    reference=int8_linear_weight_only,
    fake=_fake_of("int8_linear_weight_only"),
    **_gradients("int8_linear_weight_only"),
)
