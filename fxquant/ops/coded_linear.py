"""linear_weight_only and linear_dynamic: linears over packed weights of any number format.

linear_weight_only: y = sum over k of x[k] * value[n, k], in float32. linear_dynamic: x is quantized to int8, per token
or in groups; products that share their scales are summed up exactly in integers, these sums in float32:
y = x_scale * sum over g of scale[g] * float(sum over k in g of xc[k] * (code[k] - zero[g])), or with x_scale[g] in the
sum. Then tensor_scale and bias in float32, and one rounding to `dtype`. The gradient to x is that of a linear over the
decoded weight: straight through the rounding of x for the dynamic one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import GradientsNeedTraining, InvalidSpec, ShapeMismatch
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
from fxquant.ops.checks import ACTIVATION_DTYPES, check_activation, check_devices
from fxquant.ops.library import declare
from fxquant.ops.panels import check_coded, check_output, decode_weight
from fxquant.ops.quantize import quantize_dynamic
from fxquant.spec import TensorSpec

# 512 * 127 * 255 < 2**24: so many products of a code and a pattern with its zero point off sum up exactly in float32.
EXACT_IN_FLOAT32 = 512
# A kernel sums in int32: 65536 * 127 * 255 < 2**31. A longer granule counts as several.
MOST_IN_INT32 = 65536
QUAD = 4


def linear_weight_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Linear of float x with a packed weight.

    x [..., K] float32, bfloat16 or float16; packed, scale, zero_point and tensor_scale as in decode_weight; bias [N] or
    None. Returns [..., N] in `dtype`. `isa` picks a kernel's instruction set, for tests; the reference has none. A
    kernel may round x to 2**-22 of its row's largest value, one of 16 bits to 2**-15, where the weight's codes are
    integers: docs/numbers.md. An
    infinite x may give NaN in its row where the reference gives infinity: kernels take sums over a group times the zero
    point from sums over it. What stands behind it: see `fxquant.ops.around`.
    """
    op = "fxquant.linear_weight_only"
    check_coded(op, packed, scale, zero_point, tensor_scale, out_features, in_features, spec)
    _check_linear(op, x, packed, bias, out_features, in_features, dtype)
    _check_around(op, x, out_features, residual, activation, dtype, prologue, by, shift)
    x = prepared(x, prologue, by, shift, eps)
    value = decode_weight(packed, scale, zero_point, tensor_scale, out_features, in_features, spec, torch.float32)
    y = numerics.matmul_float32(x.reshape(x.shape[:-1].numel(), in_features), value)
    return finished(y, bias, residual, activation, dtype, [*x.shape[:-1], columns_of(out_features, activation)])


def _linear_weight_only_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    op = "fxquant.linear_weight_only"
    check_coded(op, packed, scale, zero_point, tensor_scale, out_features, in_features, spec)
    _check_linear(op, x, packed, bias, out_features, in_features, dtype)
    _check_around(op, x, out_features, residual, activation, dtype, prologue, by, shift)
    return x.new_empty([*x.shape[:-1], columns_of(out_features, activation)], dtype=dtype)


def linear_dynamic(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    x_group: int = 0,
) -> Tensor:
    """Linear of x, quantized to int8 here, with a packed weight of integers.

    spec: an integer format, symmetric or affine, with float32 or bfloat16 scales per tensor or channel, or by groups of
    a multiple of 4. x_group: so many values of a row of x share a scale (a multiple of 4), all of them if it is 0.
    All else as in linear_weight_only.
    """
    op = "fxquant.linear_dynamic"
    parsed = _check_dynamic(op, x, packed, scale, zero_point, bias, out_features, in_features, spec, dtype, x_group)
    _check_around(op, x, out_features, residual, activation, dtype, prologue, by, shift)
    x_spec = f"int8/group{x_group}" if x_group else "int8/token"
    x_codes, x_scale, _ = quantize_dynamic(prepared(x, prologue, by, shift, eps), x_spec)
    x_codes = x_codes.reshape(x.shape[:-1].numel(), in_features)
    x_scale = x_scale.reshape(x_codes.shape[0], x_scale.shape[-1])
    rows = numerics.rows_spec(parsed)
    codes = numerics.unpack_panels(packed, out_features, in_features, parsed).to(torch.int16)
    if zero_point is not None and parsed.has_zero_point:
        zeros = numerics.unpack_granules(zero_point, parsed, out_features, in_features).to(torch.int16)
        codes = codes - numerics.spread(zeros, codes.shape, rows.granularity)
    scales = numerics.unpack_granules(scale, parsed, out_features, in_features).float()
    y = torch.zeros(x_codes.shape[0], out_features, device=x.device)
    for part, granule, group in _pieces(in_features, rows.granularity.size, x_group):
        value = integer_product(x_codes[:, part], codes[:, part]).float() * scales[:, granule]
        y += value * x_scale[:, group : group + 1] if x_group else value
    if not x_group:
        y *= x_scale
    return finished(y, bias, residual, activation, dtype, [*x.shape[:-1], columns_of(out_features, activation)])


def _linear_dynamic_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    isa: int = 0,
    residual: Tensor | None = None,
    activation: str = "",
    prologue: str = "",
    by: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    x_group: int = 0,
) -> Tensor:
    op = "fxquant.linear_dynamic"
    _check_dynamic(op, x, packed, scale, zero_point, bias, out_features, in_features, spec, dtype, x_group)
    _check_around(op, x, out_features, residual, activation, dtype, prologue, by, shift)
    return x.new_empty([*x.shape[:-1], columns_of(out_features, activation)], dtype=dtype)


def x_group_of(spec: str) -> int | None:
    """The x_group by which linear_dynamic quantizes x to that spec; None if it can't."""
    if spec == "int8/token":
        return 0
    parsed = TensorSpec.parse(spec)
    size = parsed.granularity.size
    return size if str(parsed) == f"int8/group{size}" and size % QUAD == 0 else None


def _pieces(in_features: int, size: int, x_group: int) -> list[tuple[slice, int, int]]:
    """The k that are summed up in integers, and the granule and the group of x that they belong to.

    size: of a granule; it and x_group: 0 is all of K.
    """
    size, x_group = min(size or in_features, in_features), min(x_group or in_features, in_features)
    pieces, begin = list[tuple[slice, int, int]](), 0
    while begin < in_features:
        granule, group = begin // size, begin // x_group
        longest = granule * size + ((begin - granule * size) // MOST_IN_INT32 + 1) * MOST_IN_INT32
        end = min(longest, (granule + 1) * size, (group + 1) * x_group, in_features)
        pieces.append((slice(begin, end), granule, group))
        begin = end
    return pieces


def integer_product(x_codes: Tensor, codes: Tensor) -> Tensor:
    """int8 codes [M, K] times codes [N, K] of at most 9 bits, transposed -> int64 [M, N], exact."""
    total = torch.zeros(x_codes.shape[0], codes.shape[0], dtype=torch.int64, device=codes.device)
    for start in range(0, codes.shape[1], EXACT_IN_FLOAT32):
        part = slice(start, start + EXACT_IN_FLOAT32)
        total += numerics.matmul_float32(x_codes[:, part], codes[:, part]).to(torch.int64)
    return total


def _check_around(
    op: str,
    x: Tensor,
    out_features: int,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    prologue: str,
    by: Tensor | None,
    shift: Tensor | None,
) -> None:
    check_before(op, x, prologue, by, shift)
    check_after(op, x, out_features, residual, activation, dtype)


def _check_linear(
    op: str, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    check_activation(op, x)
    check_devices(op, x=x, packed=packed, bias=bias)
    check_output(op, dtype)
    if x.shape[-1] != in_features:
        raise ShapeMismatch(op, f"an activation of shape {list(x.shape)}", f"last dimension {in_features}")
    if bias is not None and (bias.dtype not in ACTIVATION_DTYPES or list(bias.shape) != [out_features]):
        met = f"bias of shape {list(bias.shape)} and dtype {bias.dtype}"
        raise ShapeMismatch(op, met, f"a float bias of shape [{out_features}]")


def _check_dynamic(
    op: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    text: str,
    dtype: torch.dtype,
    x_group: int,
) -> TensorSpec:
    spec = check_coded(op, packed, scale, zero_point, None, out_features, in_features, text)
    size = spec.granularity.size
    whole = size == 0 or size >= in_features
    if spec.format.kind != "int" or spec.scheme == "shift" or not (whole or size % QUAD == 0):
        wanted = f"{op} takes integers, symmetric or affine, per tensor or channel or in groups of a multiple of {QUAD}"
        raise InvalidSpec(text, wanted)
    if x_group < 0 or x_group % QUAD:
        raise InvalidSpec(f"x_group={x_group}", f"{op} takes 0, for a scale per token, or a multiple of {QUAD}")
    _check_linear(op, x, packed, bias, out_features, in_features, dtype)
    return spec


def _save_weight(at: dict[str, int]) -> Any:
    """setup_context of an op whose arguments have these positions."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        bias = inputs[at["bias"]]
        tensor_scale = inputs[at["tensor_scale"]] if "tensor_scale" in at else None
        ctx.save_for_backward(inputs[1], inputs[2], inputs[3], tensor_scale)
        ctx.sizes, ctx.spec = inputs[at["out_features"] : at["out_features"] + 2], inputs[at["spec"]]
        ctx.dtype, ctx.bias_dtype = inputs[0].dtype, None if bias is None else bias.dtype

    return save


def _gradients(op: str, at: dict[str, int], plain: int, more: int = 0) -> dict[str, Any]:
    """more: arguments behind those of a prologue."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[2 : at["bias"]]):  # scale, zero point or shift, tensor scale
            raise GradientsNeedTraining(f"fxquant.{op}, weight scale")
        rows = grad.float()
        grads: list[Tensor | None] = [None] * plain
        if ctx.needs_input_grad[0]:
            value = torch.ops.fxquant.decode_weight.default(*ctx.saved_tensors, *ctx.sizes, ctx.spec, torch.float32)
            grads[0] = (rows @ value).to(ctx.dtype)
        if ctx.needs_input_grad[at["bias"]]:
            grads[at["bias"]] = rows.reshape(-1, rows.shape[-1]).sum(0).to(ctx.bias_dtype)
        return tuple(grads)

    setup_context, of_all = plain_gradients(op, plain, plain + 6 + more, _save_weight(at), backward)
    return {"backward": of_all, "setup_context": setup_context}


_WEIGHT_ONLY = {"tensor_scale": 4, "bias": 5, "out_features": 6, "spec": 8}
_DYNAMIC = {"bias": 4, "out_features": 5, "spec": 7}

declare(
    "linear_weight_only(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "Tensor? bias, int out_features, int in_features, str spec, ScalarType dtype, int isa=0, "
    f"{AFTER}, {BEFORE}) -> Tensor",
    reference=linear_weight_only,
    fake=_linear_weight_only_fake,
    **_gradients("linear_weight_only", _WEIGHT_ONLY, 11),
)
declare(
    "linear_dynamic(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int out_features, "
    f"int in_features, str spec, ScalarType dtype, int isa=0, {AFTER}, {BEFORE}, int x_group=0) -> Tensor",
    reference=linear_dynamic,
    fake=_linear_dynamic_fake,
    **_gradients("linear_dynamic", _DYNAMIC, 10, more=1),
)
