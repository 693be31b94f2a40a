"""tiled_linear and tiled_linear_codes: linears over weights in the layout of the Triton kernels, of any format.

tiled_linear: z = sum over k of x[k] * value[n, k] in float32, value decoded as by decode_tiles.
tiled_linear_codes: x is codes. A piece of K is a stretch that has one scale on either side; sums of integer codes (with
the weight's zero point off) are exact, of float ones in float32:
z = sum over pieces of float(sum over k of xv[k] * v[n, k]) * (x_scale * scale); x_scale is taken out of the sum where a
row of x has only one. Scales of one byte (e8m0, e4m3) are multiplied onto the values instead, which is exact.

Then y = activation(z + bias) + residual in float32, and one rounding to `dtype`. `plan` says by which configurations of
which kernels a GPU computes it (`fxquant.target.Plan.to_ints`; empty: as this machine's tables say); the reference has
no use for it. The gradient to x is that of a linear over the decoded weight; codes have none, but the bias and the
residual that are added to their product have, where no activation function stands between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import GradientsNeedTraining
from fxquant.numerics.tiles import unpack_tiles
from fxquant.ops.around import finished
from fxquant.ops.coded_linear import integer_product
from fxquant.ops.library import declare
from fxquant.ops.tiled_checks import check_codes_linear, check_tiled_linear, stored_form
from fxquant.ops.tiles import by_rows, decode_tiles
from fxquant.spec import TensorSpec

_OPS = torch.ops.fxquant


def tiled_linear(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    plan: Sequence[int],
) -> Tensor:
    """Linear of float x with a tiled weight.

    x [..., K] float32, bfloat16 or float16; tiles, scale, zero_point and tensor_scale as in decode_tiles; bias [N] of
    any float dtype or None; residual [..., N] in `dtype` or None; activation '', 'relu', 'gelu', 'gelu_tanh' or 'silu'.
    Returns [..., N] in `dtype`.
    """
    check_tiled_linear(x, tiles, scale, zero_point, tensor_scale, bias, residual, activation, in_features, spec, dtype)
    value = decode_tiles(tiles, scale, zero_point, tensor_scale, in_features, spec, torch.float32)
    z = numerics.matmul_float32(x.reshape(x.shape[:-1].numel(), in_features), value)
    return finished(z, bias, residual, activation, dtype, [*x.shape[:-1], tiles.shape[0]])


def _tiled_linear_fake(x: Tensor, tiles: Tensor, *others: Any) -> Tensor:
    *_, dtype, _plan = others
    check_tiled_linear(x, tiles, *others[:-1])
    return x.new_empty([*x.shape[:-1], tiles.shape[0]], dtype=dtype)


def tiled_linear_codes(
    codes: Tensor,
    x_scale: Tensor,
    x_tensor_scale: Tensor | None,
    x_spec: str,
    tiles: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    plan: Sequence[int],
) -> Tensor:
    """Linear of codes of x with a tiled weight.

    codes [..., K] in the code dtype of x_spec, 4-bit ones also as rows of pack_rows, [..., ceil(K / 2)]; x_scale and
    x_tensor_scale as quantize_dynamic makes them, per tensor, token or group. Where both sides are scaled by small
    blocks (`fxquant.numerics.tiles.scaled_by_blocks`) tiles are rows of pack_rows, and scale is [N, granules], as
    quantize_weight makes it. The rest is as in tiled_linear.
    """
    weight = (tiles, scale, zero_point, tensor_scale)
    parsed, x_parsed = check_codes_linear(
        codes, x_scale, x_tensor_scale, x_spec, *weight, bias, residual, activation, in_features, spec, dtype
    )
    rows = codes.shape[:-1].numel()
    x_codes = codes.reshape(rows, codes.shape[-1])
    if codes.shape[-1] != in_features:
        x_codes = numerics.unpack_codes_rows(x_codes, x_parsed, in_features)
    x_scales = x_scale.reshape(-1, x_scale.shape[-1])
    if stored_form(parsed, x_parsed):
        w_codes, w_scales = numerics.unpack_codes_rows(tiles, parsed, in_features), scale
    else:
        w_codes, w_scales = unpack_tiles(tiles, in_features, parsed), by_rows(scale)
    if parsed.scale_dtype.itemsize == 1 and x_parsed.scale_dtype.itemsize == 1:
        x = numerics.decode(x_codes, x_scales, None, x_parsed, torch.float32)
        z = numerics.matmul_float32(x, numerics.decode(w_codes, w_scales, None, numerics.rows_spec(parsed), x.dtype))
    else:
        w_values = w_codes.to(torch.int16) if parsed.format.kind == "int" else _values(w_codes, parsed)
        if parsed.has_zero_point and zero_point is not None:
            zeros = by_rows(zero_point).to(torch.int16)
            w_values = w_values - numerics.spread(zeros, w_values.shape, numerics.rows_spec(parsed).granularity)
        x_values = x_codes.to(torch.int16) if x_parsed.format.kind == "int" else _values(x_codes, x_parsed)
        sizes = (x_parsed.granularity.size, parsed.granularity.size)
        z = _sum_of_pieces(x_values, w_values, x_scales.float(), w_scales.float(), sizes)
    for whole, has in ((x_tensor_scale, x_parsed.has_tensor_scale), (tensor_scale, parsed.has_tensor_scale)):
        if whole is not None and has:
            z *= whole.reshape(1, -1)
    return finished(z, bias, residual, activation, dtype, [*codes.shape[:-1], tiles.shape[0]])


def _tiled_linear_codes_fake(
    codes: Tensor, x_scale: Tensor, x_tensor_scale: Tensor | None, x_spec: str, tiles: Tensor, *others: Any
) -> Tensor:
    *_, dtype, _plan = others
    check_codes_linear(codes, x_scale, x_tensor_scale, x_spec, tiles, *others[:-1])
    return codes.new_empty([*codes.shape[:-1], tiles.shape[0]], dtype=dtype)


def _values(codes: Tensor, spec: TensorSpec) -> Tensor:
    """What float codes stand for without their scale: float32, exact."""
    if not spec.format.is_small_float:
        return codes.float()
    return numerics.code_values(spec.format, codes.device)[codes.int()]


def _sum_of_pieces(x: Tensor, w: Tensor, x_scale: Tensor, scale: Tensor, sizes: tuple[int, int]) -> Tensor:
    """The products of values [M, K] and [N, K] with scales [M or 1, granules] and [N, granules], float32 [M, N]."""
    in_features = x.shape[1]
    x_size, size = (min(given or in_features, in_features) for given in sizes)
    product = integer_product if not (x.is_floating_point() or w.is_floating_point()) else numerics.matmul_float32
    if x_scale.shape[1] == scale.shape[1] == 1:
        return product(x, w).float() * (x_scale * scale.t())
    z = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    for begin, end in _pieces(in_features, x_size, size):
        factor = scale[:, begin // size].unsqueeze(0)
        if x_scale.shape[1] > 1:
            factor = x_scale[:, begin // x_size].unsqueeze(1) * factor
        z += product(x[:, begin:end], w[:, begin:end]).float() * factor
    return z if x_scale.shape[1] > 1 else z.mul_(x_scale)


def _pieces(in_features: int, x_size: int, size: int) -> list[tuple[int, int]]:
    """The stretches of K in which no scale changes."""
    starts = sorted({*range(0, in_features, x_size), *range(0, in_features, size)})
    return list(zip(starts, [*starts[1:], in_features], strict=True))


def _activation_gradient(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    match activation:
        case "relu":
            return grad * (z > 0)
        case "gelu":
            return aten.gelu_backward.default(grad, z)
        case "gelu_tanh":
            return aten.gelu_backward.default(grad, z, approximate="tanh")
        case "silu":
            return aten.silu_backward.default(grad, z)
    return grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, scale, zero_point, tensor_scale, bias, residual, activation, in_features, spec, *_ = inputs
    ctx.save_for_backward(x if activation else None, tiles, scale, zero_point, tensor_scale, bias)
    ctx.activation, ctx.in_features, ctx.spec = activation, in_features, spec
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[2:5]):
        raise GradientsNeedTraining("fxquant.tiled_linear, weight scale")
    x, *weight, bias = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 12
    rows = grad.float()
    if ctx.needs_input_grad[6]:
        grads[6] = grad.to(ctx.residual_dtype)
    if ctx.needs_input_grad[0] or ctx.activation:
        value = _OPS.decode_tiles.default(*weight, ctx.in_features, ctx.spec, torch.float32)
        if ctx.activation:
            z = x.float() @ value.t()
            rows = _activation_gradient(rows, z if bias is None else z + bias.float(), ctx.activation)
        if ctx.needs_input_grad[0]:
            grads[0] = (rows @ value).to(ctx.x_dtype)
    if ctx.needs_input_grad[5]:
        grads[5] = rows.reshape(-1, rows.shape[-1]).sum(0).to(ctx.bias_dtype)
    return tuple(grads)


def _save_of_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bias, residual, ctx.activation = inputs[8:11]
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, residual)]


def _backward_of_codes(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[:8]) or (ctx.activation and ctx.needs_input_grad[8]):
        raise GradientsNeedTraining("fxquant.tiled_linear_codes")
    grads: list[Tensor | None] = [None] * 15
    if ctx.needs_input_grad[8]:
        grads[8] = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.dtypes[0])
    if ctx.needs_input_grad[9]:
        grads[9] = grad.to(ctx.dtypes[1])
    return tuple(grads)


declare(
    "tiled_linear(Tensor x, Tensor tiles, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, Tensor? bias, "
    "Tensor? residual, str activation, int in_features, str spec, ScalarType dtype, int[] plan) -> Tensor",
    reference=tiled_linear,
    fake=_tiled_linear_fake,
    backward=_backward,
    setup_context=_save,
)
declare(
    "tiled_linear_codes(Tensor codes, Tensor x_scale, Tensor? x_tensor_scale, str x_spec, Tensor tiles, Tensor scale, "
    "Tensor? zero_point, Tensor? tensor_scale, Tensor? bias, Tensor? residual, str activation, int in_features, "
    "str spec, ScalarType dtype, int[] plan) -> Tensor",
    reference=tiled_linear_codes,
    fake=_tiled_linear_codes_fake,
    backward=_backward_of_codes,
    setup_context=_save_of_codes,
)
