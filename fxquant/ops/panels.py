"""pack_panels, unpack_panels, pack_granules and decode_weight: weights of any format in the layout of the kernels."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import GradientsNeedTraining, InvalidSpec, ShapeMismatch
from fxquant.numerics.held import held_dtype
from fxquant.ops.checks import ACTIVATION_DTYPES, check_devices
from fxquant.ops.library import declare, no_gradient
from fxquant.spec import TensorSpec


def pack_panels(codes: Tensor, spec: str) -> Tensor:
    """Codes [N, K] of the spec -> uint8, flat, in the layout of numerics.panels."""
    return numerics.pack_panels(codes, _codes_spec(codes, spec))


def _pack_panels_fake(codes: Tensor, spec: str) -> Tensor:
    parsed = _codes_spec(codes, spec)
    return codes.new_empty(numerics.panel_shape(codes.shape[0], codes.shape[1], parsed), dtype=torch.uint8)


def unpack_panels(packed: Tensor, out_features: int, in_features: int, spec: str) -> Tensor:
    """The inverse of pack_panels: codes [out_features, in_features] in the spec's code dtype."""
    parsed = panel_spec("fxquant.unpack_panels", spec)
    check_panels("fxquant.unpack_panels", packed, out_features, in_features, parsed)
    return numerics.unpack_panels(packed, out_features, in_features, parsed)


def _unpack_panels_fake(packed: Tensor, out_features: int, in_features: int, spec: str) -> Tensor:
    parsed = panel_spec("fxquant.unpack_panels", spec)
    check_panels("fxquant.unpack_panels", packed, out_features, in_features, parsed)
    return packed.new_empty([out_features, in_features], dtype=held_dtype(parsed.code_dtype, packed.device))


def pack_granules(t: Tensor, spec: str, out_features: int, in_features: int) -> Tensor:
    """Scales (zero points, shifts) of a weight [N, K] -> flat, in their own dtype and the order of numerics.panels."""
    return numerics.pack_granules(t, _granules_spec(t, spec, out_features, in_features), out_features, in_features)


def _pack_granules_fake(t: Tensor, spec: str, out_features: int, in_features: int) -> Tensor:
    parsed = _granules_spec(t, spec, out_features, in_features)
    return t.new_empty(numerics.granule_shape(out_features, in_features, parsed, joined=t.shape[0] != 1))


def decode_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] that packed codes stand for, bit-equal to `fxquant.numerics.decode` of the codes.

    scale, zero_point: as pack_granules makes them; tensor_scale float32 [1, 1] or [N, 1]. dtype: float32, bfloat16 or
    float16.
    """
    parsed = check_coded(
        "fxquant.decode_weight", packed, scale, zero_point, tensor_scale, out_features, in_features, spec
    )
    check_output("fxquant.decode_weight", dtype)
    codes = numerics.unpack_panels(packed, out_features, in_features, parsed)
    zeros = None
    if parsed.has_zero_point and zero_point is not None:
        zeros = numerics.unpack_granules(zero_point, parsed, out_features, in_features)
    scales = numerics.unpack_granules(scale, parsed, out_features, in_features)
    return numerics.decode(codes, scales, zeros, numerics.rows_spec(parsed), dtype, tensor_scale)


def _decode_weight_fake(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_features: int,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    check_coded("fxquant.decode_weight", packed, scale, zero_point, tensor_scale, out_features, in_features, spec)
    check_output("fxquant.decode_weight", dtype)
    return torch.empty([out_features, in_features], dtype=dtype, device=packed.device)


def panel_spec(op: str, text: str) -> TensorSpec:
    """The spec of a weight that has a panel form."""
    spec = TensorSpec.parse(text)
    if not numerics.fits_panels(spec):
        raise InvalidSpec(text, f"{op} takes a weight per tensor, channel, group or block, such as int4/group128")
    return spec


def check_panels(op: str, packed: Tensor, out_features: int, in_features: int, spec: TensorSpec) -> None:
    """packed has the panel layout of codes [out_features, in_features]."""
    wanted = numerics.panel_shape(out_features, in_features, spec)
    if packed.dtype != torch.uint8 or list(packed.shape) != wanted:
        met = f"packed of shape {list(packed.shape)} and dtype {packed.dtype}"
        raise ShapeMismatch(op, met, f"uint8 {wanted} for a weight [{out_features}, {in_features}] of {spec}")


def check_coded(
    op: str,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    out_features: int,
    in_features: int,
    text: str,
) -> TensorSpec:
    """All tensors of a packed weight fit together and lie on one device. Returns its spec."""
    spec = panel_spec(op, text)
    check_devices(op, packed=packed, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale)
    if not 1 <= in_features <= numerics.MAX_IN_FEATURES:
        raise ShapeMismatch(op, f"in_features {in_features}", f"1 to {numerics.MAX_IN_FEATURES}")
    check_panels(op, packed, out_features, in_features, spec)
    shapes = [numerics.granule_shape(out_features, in_features, spec, joined) for joined in (False, True)]
    _check_granules(op, "scale", scale, held_dtype(spec.scale_dtype, packed.device), shapes, spec)
    if spec.has_zero_point:
        dtype = torch.uint8 if spec.scheme == "affine" else spec.scale_dtype
        _check_granules(op, "zero_point", zero_point, dtype, shapes, spec)
    if spec.has_tensor_scale:
        joined = [[1, 1], [out_features, 1]]
        fits = tensor_scale is not None and list(tensor_scale.shape) in joined and tensor_scale.dtype == torch.float32
        if not fits:
            raise ShapeMismatch(op, _described("tensor_scale", tensor_scale), f"float32 [1, 1] or [N, 1] for {spec}")
    return spec


def check_output(op: str, dtype: torch.dtype) -> None:
    """dtype is one that kernels write."""
    if dtype not in ACTIVATION_DTYPES:
        raise ShapeMismatch(op, f"output dtype {dtype}", "float32, bfloat16 or float16")


def _check_granules(
    op: str, what: str, t: Tensor | None, dtype: torch.dtype, shapes: list[list[int]], spec: TensorSpec
) -> None:
    if t is None or t.dtype != dtype or list(t.shape) not in shapes:
        wanted = f"{dtype} of shape {shapes[0]}, made by pack_granules, for spec {spec}"
        raise ShapeMismatch(op, _described(what, t), wanted)


def _described(what: str, t: Tensor | None) -> str:
    return f"no {what}" if t is None else f"{what} of shape {list(t.shape)} and dtype {t.dtype}"


def _codes_spec(codes: Tensor, text: str) -> TensorSpec:
    spec = panel_spec("fxquant.pack_panels", text)
    if codes.dim() != 2 or codes.dtype != held_dtype(spec.code_dtype, codes.device):
        met = f"codes of {codes.dim()} dimensions and dtype {codes.dtype}"
        raise ShapeMismatch("fxquant.pack_panels", met, f"{spec.code_dtype} of shape [N, K] for spec {spec}")
    return spec


def _granules_spec(t: Tensor, text: str, out_features: int, in_features: int) -> TensorSpec:
    spec = panel_spec("fxquant.pack_granules", text)
    wanted = spec.granularity.scale_shape([out_features, in_features])
    shapes = [wanted]
    if spec.granularity.kind in ("tensor", "channel", "token"):
        shapes += [[1, 1], [out_features, 1]]
    if list(t.shape) not in shapes:
        met = f"a tensor of shape {list(t.shape)}"
        raise ShapeMismatch("fxquant.pack_granules", met, f"shape {wanted} for spec {spec}")
    return spec


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise GradientsNeedTraining("fxquant.decode_weight")


declare(
    "pack_panels(Tensor codes, str spec) -> Tensor packed",
    reference=pack_panels,
    fake=_pack_panels_fake,
    backward=no_gradient,
)
declare(
    "unpack_panels(Tensor packed, int out_features, int in_features, str spec) -> Tensor codes",
    reference=unpack_panels,
    fake=_unpack_panels_fake,
    backward=no_gradient,
)
declare(
    "pack_granules(Tensor t, str spec, int out_features, int in_features) -> Tensor packed",
    reference=pack_granules,
    fake=_pack_granules_fake,
    backward=no_gradient,
)
declare(
    "decode_weight(Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, int out_features, "
    "int in_features, str spec, ScalarType dtype) -> Tensor",
    reference=decode_weight,
    fake=_decode_weight_fake,
    backward=_refuse,
)
