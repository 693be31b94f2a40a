"""Argument checks that references and fakes share; each raises a named error."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import InvalidSpec, ShapeMismatch, UnsupportedActivation
from fxquant.numerics import MAX_IN_FEATURES, packed_shape
from fxquant.numerics.held import held_dtype
from fxquant.spec import INT8, TensorSpec

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def activation_spec(op: str, x: Tensor, text: str) -> TensorSpec:
    """The spec of a dynamically quantized activation: symmetric int8 or a float format, not by channel or block."""
    spec = TensorSpec.parse(text)
    known = (spec.format == INT8 or spec.format.kind == "float") and spec.scheme == "symmetric"
    if not known or spec.granularity.kind not in ("tensor", "token", "sample", "group"):
        wanted = f"{op} takes int8 or a float format, symmetric, per tensor, token, sample or group, such as int8/token"
        raise InvalidSpec(text, wanted)
    check_granularity(op, x, spec)
    return spec


def check_activation(op: str, x: Tensor) -> None:
    """x is float32, bfloat16 or float16 and has at least one dimension."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise UnsupportedActivation(op, x.dtype)
    if x.dim() == 0:
        raise ShapeMismatch(op, "an activation without dimensions", "one of shape [..., K]")


def check_granularity(op: str, x: Tensor, spec: TensorSpec) -> None:
    """The spec's granularity exists for a tensor of that shape."""
    problem = spec.granularity.unfit(x.shape)
    if problem:
        raise ShapeMismatch(op, f"a tensor of shape {list(x.shape)} for spec {spec}", f"another shape ({problem})")


def check_scale(op: str, codes: Tensor, scale: Tensor, spec: TensorSpec) -> None:
    """scale has the dtype and the shape that the spec gives; [N, 1, ...] too for tensors joined along axis 0."""
    wanted = spec.granularity.scale_shape(codes.shape)
    shapes = [wanted, joined_shape(codes)] if spec.granularity.kind == "tensor" and codes.dim() else [wanted]
    if scale.dtype != held_dtype(spec.scale_dtype, scale.device) or list(scale.shape) not in shapes:
        met = f"scale of shape {list(scale.shape)} and dtype {scale.dtype}"
        raise ShapeMismatch(op, met, f"{spec.scale_dtype} of shape {wanted} for spec {spec}")


def check_tensor_scale(op: str, codes: Tensor, tensor_scale: Tensor | None, spec: TensorSpec) -> None:
    """There is a tensor_scale, float32 [1, 1] or [N, 1], where the spec has one."""
    if not spec.has_tensor_scale:
        return
    wanted = [1] * codes.dim()
    met = "no tensor_scale"
    if tensor_scale is not None:
        if tensor_scale.dtype == torch.float32 and list(tensor_scale.shape) in (wanted, joined_shape(codes)):
            return
        met = f"tensor_scale of shape {list(tensor_scale.shape)} and dtype {tensor_scale.dtype}"
    raise ShapeMismatch(op, met, f"float32 of shape {wanted} for spec {spec}")


def joined_shape(codes: Tensor) -> list[int]:
    """Shape of numbers that belong to whole tensors, after these were joined along axis 0: one a row."""
    return [codes.shape[0]] + [1] * (codes.dim() - 1)


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """All tensors are where the first one is.

    Beside a meta tensor the dispatcher runs the fake, whose result for a CPU tensor would be whatever memory held.
    """
    (first, place), *others = [(name, t.device) for name, t in tensors.items() if t is not None]
    for name, device in others:
        if device != place:
            raise ShapeMismatch(op, f"{name} on device {device}", f"{place}, where {first} is,")


def check_codes(op: str, name: str, codes: Tensor, ndim: int | None = None) -> None:
    """Codes are int8, of that many dimensions."""
    if codes.dtype != torch.int8:
        raise ShapeMismatch(op, f"{name} of dtype {codes.dtype}", "torch.int8")
    if ndim is not None and codes.dim() != ndim:
        raise ShapeMismatch(op, f"{name} of {codes.dim()} dimensions", f"{ndim}")
    if codes.dim() == 0:
        raise ShapeMismatch(op, f"{name} without dimensions", "shape [..., K]")


def check_packed(op: str, packed: Tensor, out_features: int, in_features: int) -> None:
    """packed has the int8 layout of codes [out_features, in_features]."""
    check_codes(op, "packed", packed, 1)
    wanted = packed_shape(out_features, in_features)
    if list(packed.shape) != wanted:
        raise ShapeMismatch(
            op, f"packed of shape {list(packed.shape)}", f"{wanted} for a weight [{out_features}, {in_features}]"
        )


def check_linear(op: str, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> int:
    """The tensors of a linear over packed int8 codes fit together. Returns N."""
    check_devices(op, x=x, packed=packed, scale=scale, bias=bias)
    if in_features > MAX_IN_FEATURES:
        raise ShapeMismatch(
            op,
            f"in_features {in_features}",
            f"at most {MAX_IN_FEATURES}, beyond which sums of codes may overflow,",
        )
    if x.shape[-1] != in_features:
        raise ShapeMismatch(op, f"an activation of shape {list(x.shape)}", f"last dimension {in_features}")
    out_features = scale.shape[0] if scale.dim() else 1
    if scale.dtype != torch.float32 or scale.dim() not in (1, 2) or scale.numel() != out_features:
        raise ShapeMismatch(
            op, f"scale of shape {list(scale.shape)} and dtype {scale.dtype}", "float32 of shape [N, 1] or [N]"
        )
    check_packed(op, packed, out_features, in_features)
    if bias is None:
        return out_features
    if bias.dtype not in ACTIVATION_DTYPES or list(bias.shape) != [out_features]:
        raise ShapeMismatch(
            op, f"bias of shape {list(bias.shape)} and dtype {bias.dtype}", f"a float bias of shape [{out_features}]"
        )
    return out_features
