"""What the linears of the CPU do around their product: a norm or a gate before it, activation and residual behind it.

Before: x is normalized, or goes through an activation function and is multiplied by another tensor, in float32; the
result is rounded to x's dtype. Behind: y = activation(y + bias) + residual in float32, before y is rounded; or, where
the halves of y's columns are a gate and what it gates, y = activation(one half) * other half + residual. Functions of a
kernel are within 8u |y| of torch's, u = 2**-24 (gelu: 8u |input|), and its sums over K may be added in another
order, so that a code of what is quantized behind them may differ by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import GradientsNeedTraining, InvalidSpec, ShapeMismatch
from fxquant.ops.checks import ACTIVATION_DTYPES, check_devices
from fxquant.ops.norm_quantize import NORMS, normalized

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")
GATES = tuple(f"{name}_mul" for name in ACTIVATIONS[1:])
# Of half the columns, the first or the second of them, times the other half.
HALVES = tuple(f"{name}_{half}" for name in ACTIVATIONS[1:] for half in ("first", "second"))
# The arguments of a linear behind `isa`, in a schema.
AFTER = "Tensor? residual=None, str activation=''"
BEFORE = "str prologue='', Tensor? by=None, Tensor? shift=None, float eps=0."


def prepared(x: Tensor, prologue: str, by: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """x [..., K] as the product reads it, in x's dtype.

    prologue  '', 'rmsnorm' or 'layernorm' with weight `by` [K], bias `shift` [K], either may be None, and `eps`; or
              'silu_mul' and the like: silu(x) * by, `by` of x's shape and dtype.
    """
    if not prologue:
        return x
    if prologue in NORMS:
        return normalized(x, prologue, by, shift, eps)
    assert by is not None
    return (activated(x.float(), prologue.removesuffix("_mul")) * by.float()).to(x.dtype)


def finished(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, dtype: torch.dtype, shape: list[int]
) -> Tensor:
    """activation(y + bias) + residual of y float32 [M, N], rounded to `dtype`, of that shape.

    Of one of HALVES: 'silu_first' is silu(first N / 2 columns) * last N / 2, 'silu_second' first * silu(last).
    """
    if bias is not None:
        y = y + bias.float()
    if activation in HALVES:
        first, second = y.chunk(2, -1)
        name, half = activation.rsplit("_", 1)
        y = activated(first, name) * second if half == "first" else first * activated(second, name)
    else:
        y = activated(y, activation)
    if residual is not None:
        y = y + residual.float().reshape(y.shape)
    return y.to(dtype).reshape(shape)


def activated(z: Tensor, activation: str) -> Tensor:
    """The function of that name, one of ACTIVATIONS, on float32."""
    match activation:
        case "relu":
            return torch.relu(z)
        case "gelu":
            return torch.nn.functional.gelu(z)
        case "gelu_tanh":
            return torch.nn.functional.gelu(z, approximate="tanh")
        case "silu":
            return torch.nn.functional.silu(z)
    return z


def check_before(op: str, x: Tensor, prologue: str, by: Tensor | None, shift: Tensor | None) -> None:
    """The operands of a prologue fit together."""
    check_devices(op, x=x, by=by, shift=shift)
    if prologue not in ("", *NORMS, *GATES):
        raise InvalidSpec(prologue, f"{op} takes the prologues {', '.join(map(repr, ('', *NORMS, *GATES)))}")
    if prologue in GATES:
        if by is None or by.dtype != x.dtype or list(by.shape) != list(x.shape):
            met = "no `by`" if by is None else f"`by` of shape {list(by.shape)} and dtype {by.dtype}"
            raise ShapeMismatch(op, met, f"{x.dtype} of shape {list(x.shape)}, to multiply x with,")
        return
    if (shift is not None and prologue != "layernorm") or (by is not None and not prologue):
        raise InvalidSpec(prologue, f"{op} takes `by` with a prologue, and `shift` with 'layernorm'")
    for name, t in (("by", by), ("shift", shift)):
        if t is not None and (list(t.shape) != [x.shape[-1]] or t.dtype not in ACTIVATION_DTYPES):
            raise ShapeMismatch(op, f"{name} of shape {list(t.shape)} and dtype {t.dtype}", f"float [{x.shape[-1]}]")


def columns_of(out_features: int, activation: str) -> int:
    """Columns of the result of a product with N = out_features."""
    return out_features // 2 if activation in HALVES else out_features


def check_after(
    op: str,
    x: Tensor,
    out_features: int,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    halves: bool = True,
) -> None:
    """The operands of an epilogue fit together. x: [..., K], of which [..., N] or [..., N / 2] in `dtype` is made.

    halves: whether the op has kernels for HALVES.
    """
    check_devices(op, x=x, residual=residual)
    known = (*ACTIVATIONS, *HALVES) if halves else ACTIVATIONS
    if activation not in known:
        raise InvalidSpec(activation, f"{op} takes the activations {', '.join(map(repr, known))}")
    if activation in HALVES and out_features % (2 * numerics.PANEL):
        wanted = f"a multiple of {2 * numerics.PANEL} for the activation {activation!r}: two halves of whole panels"
        raise ShapeMismatch(op, f"a weight of {out_features} output features", wanted)
    shape = [*x.shape[:-1], columns_of(out_features, activation)]
    if residual is not None and (residual.dtype != dtype or list(residual.shape) != shape):
        met = f"residual of shape {list(residual.shape)} and dtype {residual.dtype}"
        raise ShapeMismatch(op, met, f"{dtype} of shape {shape}")


Save = Callable[[Any, tuple[Any, ...], Tensor], None]
Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def plain_gradients(op: str, plain: int, arguments: int, save: Save, backward: Backward) -> tuple[Save, Backward]:
    """(setup_context, backward) of an op, from those of its first `plain` arguments: the others are for inference.

    A gradient through a call that uses them is refused: GradientsNeedTraining.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.fused = any(value is not None and value != "" for value in (inputs[plain], *inputs[plain + 1 : plain + 3]))
        save(ctx, inputs[:plain], output)

    def of_all(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fused:
            raise GradientsNeedTraining(f"fxquant.{op}, with what a graph for inference fused into it")
        grads = backward(ctx, grad)
        return *grads, *[None] * (arguments - len(grads))

    return setup_context, of_all
