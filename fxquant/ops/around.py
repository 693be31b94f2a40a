"""What the linears of the CPU do around their product: a norm or a gate before it, activation and residual behind it.

Before: x is normalized, or goes through an activation function and is multiplied by another tensor, in float32; the
result is rounded to x's dtype. Behind: y = activation(y + bias) + residual in float32, before y is rounded. Functions
of a kernel are within 8u |y| of torch's, u = 2**-24 (gelu: 8u |input|), and its sums over K may be added in another
order, so that a code of what is quantized behind them may differ by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import GradientsNeedTraining, InvalidSpec, ShapeMismatch
from fxquant.ops.checks import ACTIVATION_DTYPES, check_devices
from fxquant.ops.norm_quantize import NORMS, normalized

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")
GATES = tuple(f"{name}_mul" for name in ACTIVATIONS[1:])
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
    """activation(y + bias) + residual of y float32 [M, N], rounded to `dtype`, of that shape."""
    if bias is not None:
        y = y + bias.float()
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


def check_after(
    op: str, x: Tensor, out_features: int, residual: Tensor | None, activation: str, dtype: torch.dtype
) -> None:
    """The operands of an epilogue fit together. x: [..., K], of which [..., N] in `dtype` is made."""
    check_devices(op, x=x, residual=residual)
    shape = [*x.shape[:-1], out_features]
    if residual is not None and (residual.dtype != dtype or list(residual.shape) != shape):
        met = f"residual of shape {list(residual.shape)} and dtype {residual.dtype}"
        raise ShapeMismatch(op, met, f"{dtype} of shape {shape}")
    if activation not in ACTIVATIONS:
        raise InvalidSpec(activation, f"{op} takes the activations {', '.join(map(repr, ACTIVATIONS))}")


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
