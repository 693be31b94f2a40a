"""experts_linear and experts_matmul: runs of rows, each with a matrix of its own, as the experts of a router have.

x [S, K] holds the rows of matrix 0, then those of matrix 1, and so on; ends int64 [E] says where those of each end.
Rows behind the last end belong to none, and give 0. A matrix that no row belongs to is not read.

experts_linear reads packed weights, matrix by matrix, by the ops of a single one: their errors and gradients are its
own. experts_matmul takes float ones. experts_linear_backward and experts_outer are their gradients, which a compiler
must not look into either: how many rows a matrix has is known at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.errors import GradientsNeedTraining, InvalidSpec, ShapeMismatch
from fxquant.ops.checks import check_activation, check_devices
from fxquant.ops.library import declare
from fxquant.ops.linear import dequantized

LAYOUTS = ("int8", "panels", "rows")  # int8_pack's, pack_panels', pack_rows'
_OPS = torch.ops.fxquant
_Parts = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


def experts_linear(
    x: Tensor,
    ends: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    layout: str,
    dynamic: bool,
) -> Tensor:
    """Each row of x with the packed matrix [N, K] that it belongs to.

    x [S, K] float32, bfloat16 or float16; codes, scale, zero_point and tensor_scale: of E matrices, stacked, in a
    layout of `LAYOUTS`; dynamic: x is quantized per token to int8 here. Returns [S, N] in x's dtype.
    """
    _check_packed("fxquant.experts_linear", x, ends, codes, scale, in_features, layout)
    y = x.new_empty(x.shape[0], out_features)
    for here, parts in _runs(y, ends, codes, scale, zero_point, tensor_scale):
        y[here] = _product(x[here], parts, out_features, in_features, spec, layout, dynamic)
    return y


def _experts_linear_fake(
    x: Tensor,
    ends: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    layout: str,
    dynamic: bool,
) -> Tensor:
    _check_packed("fxquant.experts_linear", x, ends, codes, scale, in_features, layout)
    return x.new_empty(x.shape[0], out_features)


def experts_linear_backward(
    grad: Tensor,
    ends: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    layout: str,
) -> Tensor:
    """The gradient to x [S, K] of experts_linear, in the dtype of grad [S, N]: through the decoded matrices."""
    _check_packed("fxquant.experts_linear_backward", grad, ends, codes, scale, out_features, layout)
    found = grad.new_empty(grad.shape[0], in_features)
    for here, parts in _runs(found, ends, codes, scale, zero_point, tensor_scale):
        weight = _decoded(parts, out_features, in_features, spec, layout, torch.float32)
        found[here] = (grad[here].float() @ weight).to(grad.dtype)
    return found


def _experts_linear_backward_fake(
    grad: Tensor,
    ends: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    layout: str,
) -> Tensor:
    _check_packed("fxquant.experts_linear_backward", grad, ends, codes, scale, out_features, layout)
    return grad.new_empty(grad.shape[0], in_features)


def experts_matmul(x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """Each row of x [S, K] with the matrix of weight [E, N, K] that it belongs to; [S, N], all of one float dtype."""
    _check_float("fxquant.experts_matmul", x, ends, weight)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for here, parts in _runs(y, ends, weight):
        y[here] = linear(x[here], parts[0])
    return y


def _experts_matmul_fake(x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    _check_float("fxquant.experts_matmul", x, ends, weight)
    return x.new_empty(x.shape[0], weight.shape[1])


def experts_outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient to weight [E, N, K] of experts_matmul: of each matrix, grad [S, N] times x [S, K] over its rows."""
    found = x.new_zeros(ends.shape[0], grad.shape[1], x.shape[1])
    for i, here in _slices(ends):
        found[i] = grad[here].t() @ x[here]
    return found


def _experts_outer_fake(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _slices(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The matrices that rows belong to, and which rows."""
    begin = 0
    for i, end in enumerate(ends.tolist()):
        if end > begin:
            yield i, slice(begin, end)
        begin = max(begin, end)


def _runs(y: Tensor, ends: Tensor, *stacked: Tensor | None) -> Iterator[tuple[slice, Any]]:
    """Rows of y, and the parts of the matrix that they belong to. What belongs to none becomes 0."""
    last = 0
    for i, here in _slices(ends):
        yield here, tuple(None if t is None else t[i] for t in stacked)
        last = here.stop
    y[last:] = 0


def _product(
    x: Tensor, parts: _Parts, out_features: int, in_features: int, spec: str, layout: str, dynamic: bool
) -> Tensor:
    codes, scale, zero_point, tensor_scale = parts
    if layout == "int8":
        op = _OPS.int8_linear_dynamic if dynamic else _OPS.int8_linear_weight_only
        return op.default(x, codes, scale, None, in_features)
    if layout == "rows":
        return linear(x, _decoded(parts, out_features, in_features, spec, layout, x.dtype))
    shape = (out_features, in_features)
    if dynamic:
        return _OPS.linear_dynamic.default(x, codes, scale, zero_point, None, *shape, spec, x.dtype)
    return _OPS.linear_weight_only.default(x, codes, scale, zero_point, tensor_scale, None, *shape, spec, x.dtype)


def _decoded(parts: _Parts, out_features: int, in_features: int, spec: str, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "int8":
        return dequantized(parts[0], parts[1], in_features).to(dtype)
    if layout == "rows":
        return _OPS.decode_rows.default(*parts, in_features, spec, dtype)
    return _OPS.decode_weight.default(*parts, out_features, in_features, spec, dtype)


def _check_rows(op: str, x: Tensor, ends: Tensor, features: int) -> None:
    check_activation(op, x)
    if x.dim() != 2 or x.shape[1] != features:
        raise ShapeMismatch(op, f"rows of shape {list(x.shape)}", f"shape [S, {features}]")
    if ends.dtype != torch.int64 or ends.dim() != 1:
        raise ShapeMismatch(op, f"ends of shape {list(ends.shape)} and dtype {ends.dtype}", "int64 of shape [E]")


def _check_packed(op: str, x: Tensor, ends: Tensor, codes: Tensor, scale: Tensor, features: int, layout: str) -> None:
    """What one matrix is made of, the op of a single one checks."""
    _check_rows(op, x, ends, features)
    check_devices(op, x=x, ends=ends, codes=codes, scale=scale)
    if layout not in LAYOUTS:
        raise InvalidSpec(layout, f"a layout is {', '.join(LAYOUTS)}")
    if codes.shape[0] != ends.shape[0] or scale.shape[0] != ends.shape[0]:
        met = f"codes of {codes.shape[0]} matrices, scales of {scale.shape[0]}"
        raise ShapeMismatch(op, met, f"{ends.shape[0]}, as many as there are ends,")


def _check_float(op: str, x: Tensor, ends: Tensor, weight: Tensor) -> None:
    if weight.dim() != 3 or weight.dtype != x.dtype or weight.shape[0] != ends.shape[0]:
        met = f"weight of shape {list(weight.shape)} and dtype {weight.dtype}"
        raise ShapeMismatch(op, met, f"{x.dtype} of shape [{ends.shape[0]}, N, K]")
    _check_rows(op, x, ends, weight.shape[2])
    check_devices(op, x=x, ends=ends, weight=weight)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.constants = inputs[6:10]


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[2:6]):
        raise GradientsNeedTraining("fxquant.experts_linear, weight scale")
    found = None
    if ctx.needs_input_grad[0]:
        found = _OPS.experts_linear_backward.default(grad, *ctx.saved_tensors, *ctx.constants)
    return (found, *[None] * 10)


def _save_float(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _float_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    x, ends, weight = ctx.saved_tensors
    of_x = _OPS.experts_matmul.default(grad, ends, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
    of_weight = _OPS.experts_outer.default(grad, x, ends) if ctx.needs_input_grad[2] else None
    return of_x, None, of_weight


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise GradientsNeedTraining("fxquant.experts: a gradient of a gradient")


_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? tensor_scale"
_CONSTANTS = "int out_features, int in_features, str spec, str layout"

declare(
    f"experts_linear(Tensor x, Tensor ends, {_WEIGHT}, {_CONSTANTS}, bool dynamic) -> Tensor",
    reference=experts_linear,
    fake=_experts_linear_fake,
    backward=_packed_backward,
    setup_context=_save_packed,
)
declare(
    f"experts_linear_backward(Tensor grad, Tensor ends, {_WEIGHT}, {_CONSTANTS}) -> Tensor",
    reference=experts_linear_backward,
    fake=_experts_linear_backward_fake,
    backward=_refuse,
)
declare(
    "experts_matmul(Tensor x, Tensor ends, Tensor weight) -> Tensor",
    reference=experts_matmul,
    fake=_experts_matmul_fake,
    backward=_float_backward,
    setup_context=_save_float,
)
declare(
    "experts_outer(Tensor grad, Tensor x, Tensor ends) -> Tensor",
    reference=experts_outer,
    fake=_experts_outer_fake,
    backward=_refuse,
)
