"""What tiled_linear and tiled_linear_codes check of their operands; references, fakes and kernels share it."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import InvalidSpec, ShapeMismatch
from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.ops.around import check_after
from fxquant.ops.checks import (
    ACTIVATION_DTYPES,
    check_activation,
    check_devices,
)
from fxquant.ops.panels import check_output
from fxquant.ops.tiles import check_tiled
from fxquant.spec import TensorSpec

_CODES = "fxquant.tiled_linear_codes"


def stored_form(spec: TensorSpec, x_spec: TensorSpec) -> bool:
    """Whether tiled_linear_codes wants a weight of that spec in the storage form."""
    return scaled_by_blocks(spec, x_spec)


def check_tiled_linear(
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
) -> TensorSpec:
    """The operands of tiled_linear fit together. Returns the weight's spec."""
    op = "fxquant.tiled_linear"
    check_activation(op, x)
    parsed = check_tiled(op, tiles, scale, zero_point, tensor_scale, in_features, spec)
    if x.shape[-1] != in_features:
        raise ShapeMismatch(op, f"an activation of shape {list(x.shape)}", f"last dimension {in_features}")
    _check_epilogue(op, x, tiles, bias, residual, activation, dtype)
    return parsed


def check_codes_linear(
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
) -> tuple[TensorSpec, TensorSpec]:
    """The operands of tiled_linear_codes fit together. Returns the specs of the weight and of x."""
    x_parsed = TensorSpec.parse(x_spec)
    stored = stored_form(TensorSpec.parse(spec), x_parsed)
    parsed = check_tiled(_CODES, tiles, scale, zero_point, tensor_scale, in_features, spec, stored=stored)
    if parsed.scheme == "shift":
        raise InvalidSpec(spec, f"{_CODES} takes a weight whose code 0, or zero point, is 0: symmetric or affine")
    check_devices(_CODES, codes=codes, x_scale=x_scale, x_tensor_scale=x_tensor_scale)
    _check_x(codes, x_scale, x_tensor_scale, x_parsed, in_features)
    _check_epilogue(_CODES, codes, tiles, bias, residual, activation, dtype)
    return parsed, x_parsed


def _check_x(codes: Tensor, x_scale: Tensor, x_tensor_scale: Tensor | None, spec: TensorSpec, in_features: int) -> None:
    widths = [in_features]
    if spec.format.bits == 4:
        widths.append(numerics.packed_bytes(in_features, 4))
    if codes.dim() == 0 or codes.dtype != spec.code_dtype or codes.shape[-1] not in widths:
        met = f"codes of shape {list(codes.shape)} and dtype {codes.dtype}"
        wanted = " or ".join(f"[..., {width}]" for width in widths)
        raise ShapeMismatch(_CODES, met, f"{spec.code_dtype} of shape {wanted} for x of {spec}")
    if spec.scheme != "symmetric" or spec.granularity.kind not in ("tensor", "token", "group"):
        raise InvalidSpec(spec, f"{_CODES} takes codes of x that are symmetric, per tensor, token or group")
    wanted = spec.granularity.scale_shape([*codes.shape[:-1], in_features])
    if x_scale.dtype != spec.scale_dtype or list(x_scale.shape) != wanted:
        met = f"x_scale of shape {list(x_scale.shape)} and dtype {x_scale.dtype}"
        raise ShapeMismatch(_CODES, met, f"{spec.scale_dtype} of shape {wanted} for x of {spec}")
    if spec.has_tensor_scale and (x_tensor_scale is None or list(x_tensor_scale.shape) != [1] * codes.dim()):
        met = "no x_tensor_scale" if x_tensor_scale is None else f"x_tensor_scale {list(x_tensor_scale.shape)}"
        raise ShapeMismatch(_CODES, met, f"float32 of shape {[1] * codes.dim()} for x of {spec}")


def _check_epilogue(
    op: str,
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> None:
    check_output(op, dtype)
    check_devices(op, x=x, tiles=tiles, bias=bias)
    out_features = tiles.shape[0]
    if bias is not None and (bias.dtype not in ACTIVATION_DTYPES or list(bias.shape) != [out_features]):
        met = f"bias of shape {list(bias.shape)} and dtype {bias.dtype}"
        raise ShapeMismatch(op, met, f"a float bias of shape [{out_features}]")
    check_after(op, x, out_features, residual, activation, dtype, halves=False)
