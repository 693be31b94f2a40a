"""tile_codes, untile_codes, transpose_granules and decode_tiles: weights in the layout that the Triton kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import InvalidSpec, ShapeMismatch
from fxquant.numerics import tiles as layout
from fxquant.numerics.panels import granules_along
from fxquant.ops.checks import check_devices
from fxquant.ops.library import declare, no_gradient
from fxquant.ops.panels import check_output
from fxquant.ops.quantize import refuse
from fxquant.spec import TensorSpec


def tile_codes(codes: Tensor, spec: str) -> Tensor:
    """Codes [N, K] of the spec -> uint8 [N, bytes], in the layout of numerics.tiles."""
    return layout.pack_tiles(codes, _codes_spec(codes, spec))


def _tile_codes_fake(codes: Tensor, spec: str) -> Tensor:
    parsed = _codes_spec(codes, spec)
    return codes.new_empty(layout.tiles_shape(codes.shape[0], codes.shape[1], parsed), dtype=torch.uint8)


def untile_codes(tiles: Tensor, in_features: int, spec: str) -> Tensor:
    """The inverse of tile_codes: codes [N, in_features] in the spec's code dtype."""
    parsed = tile_spec("fxquant.untile_codes", spec)
    _check_tiles("fxquant.untile_codes", tiles, in_features, parsed)
    return layout.unpack_tiles(tiles, in_features, parsed)


def _untile_codes_fake(tiles: Tensor, in_features: int, spec: str) -> Tensor:
    parsed = tile_spec("fxquant.untile_codes", spec)
    _check_tiles("fxquant.untile_codes", tiles, in_features, parsed)
    return tiles.new_empty([tiles.shape[0], in_features], dtype=parsed.code_dtype)


def transpose_granules(t: Tensor, spec: str, out_features: int, in_features: int) -> Tensor:
    """Scales (zero points, shifts) of a weight [N, K] -> [granules along K, N], in their own dtype.

    t: in the shape of the spec's granularity; of a whole tensor or a row [N, 1] too, as joined tensors have it.
    """
    return layout.transpose_granules(t, _granules_spec(t, spec, out_features, in_features), out_features, in_features)


def _transpose_granules_fake(t: Tensor, spec: str, out_features: int, in_features: int) -> Tensor:
    parsed = _granules_spec(t, spec, out_features, in_features)
    return t.new_empty([granules_along(in_features, parsed), out_features])


def decode_tiles(
    tiles: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] that tiles stand for, bit-equal to `fxquant.numerics.decode` of the codes.

    scale, zero_point: as transpose_granules makes them; tensor_scale float32 [1, 1] or [N, 1]. dtype: float32, bfloat16
    or float16.
    """
    op = "fxquant.decode_tiles"
    parsed = check_tiled(op, tiles, scale, zero_point, tensor_scale, in_features, spec)
    check_output(op, dtype)
    zeros = by_rows(zero_point) if parsed.has_zero_point and zero_point is not None else None
    codes = layout.unpack_tiles(tiles, in_features, parsed)
    return numerics.decode(codes, by_rows(scale), zeros, numerics.rows_spec(parsed), dtype, tensor_scale)


def _decode_tiles_fake(
    tiles: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    check_tiled("fxquant.decode_tiles", tiles, scale, zero_point, tensor_scale, in_features, spec)
    check_output("fxquant.decode_tiles", dtype)
    return torch.empty([tiles.shape[0], in_features], dtype=dtype, device=tiles.device)


def by_rows(t: Tensor) -> Tensor:
    """[granules, N] -> [N, granules], contiguous."""
    raw = t.view(torch.uint8) if t.dtype.itemsize == 1 else t
    return raw.t().contiguous().view(t.dtype)


def tile_spec(op: str, text: str) -> TensorSpec:
    """The spec of a weight that has a tile form."""
    spec = TensorSpec.parse(text)
    if not numerics.fits_panels(spec):
        raise InvalidSpec(text, f"{op} takes a weight per tensor, channel, group or block, such as int4/group128")
    return spec


def check_tiled(
    op: str,
    tiles: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    in_features: int,
    text: str,
    *,
    stored: bool = False,
) -> TensorSpec:
    """All tensors of a tiled weight fit together and lie on one device. Returns its spec.

    stored: the weight is in the storage form instead, rows of `numerics.bits` and scales [N, granules].
    """
    spec = tile_spec(op, text)
    check_devices(op, tiles=tiles, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale)
    if not 1 <= in_features <= numerics.MAX_IN_FEATURES:
        raise ShapeMismatch(op, f"in_features {in_features}", f"1 to {numerics.MAX_IN_FEATURES}")
    _check_tiles(op, tiles, in_features, spec, stored=stored)
    granules, out_features = granules_along(in_features, spec), tiles.shape[0]
    shape = [out_features, granules] if stored else [granules, out_features]
    _check_granules(op, "scale", scale, spec.scale_dtype, shape, spec)
    if spec.has_zero_point:
        dtype = torch.uint8 if spec.scheme == "affine" else spec.scale_dtype
        _check_granules(op, "zero_point", zero_point, dtype, shape, spec)
    if spec.has_tensor_scale:
        shapes = [[1, 1], [out_features, 1]]
        fits = tensor_scale is not None and list(tensor_scale.shape) in shapes and tensor_scale.dtype == torch.float32
        if not fits:
            raise ShapeMismatch(op, _described("tensor_scale", tensor_scale), f"float32 [1, 1] or [N, 1] for {spec}")
    return spec


def _check_tiles(op: str, tiles: Tensor, in_features: int, spec: TensorSpec, *, stored: bool = False) -> None:
    width = layout.tiles_shape(1, in_features, spec)[1]
    if stored:
        width = numerics.packed_bytes(in_features, spec.format.bits)
    if tiles.dtype != torch.uint8 or tiles.dim() != 2 or tiles.shape[1] != width:
        what = "rows as pack_rows makes them" if stored else "made by tile_codes"
        wanted = f"uint8 [N, {width}], {what}, for in_features {in_features} of {spec}"
        raise ShapeMismatch(op, _described("tiles", tiles), wanted)


def _check_granules(
    op: str, what: str, t: Tensor | None, dtype: torch.dtype, shape: list[int], spec: TensorSpec
) -> None:
    if t is None or t.dtype != dtype or list(t.shape) != shape:
        raise ShapeMismatch(op, _described(what, t), f"{dtype} of shape {shape} for spec {spec}")


def _described(what: str, t: Tensor | None) -> str:
    return f"no {what}" if t is None else f"{what} of shape {list(t.shape)} and dtype {t.dtype}"


def _codes_spec(codes: Tensor, text: str) -> TensorSpec:
    spec = tile_spec("fxquant.tile_codes", text)
    if codes.dim() != 2 or codes.dtype != spec.code_dtype:
        met = f"codes of {codes.dim()} dimensions and dtype {codes.dtype}"
        raise ShapeMismatch("fxquant.tile_codes", met, f"{spec.code_dtype} of shape [N, K] for spec {spec}")
    return spec


def _granules_spec(t: Tensor, text: str, out_features: int, in_features: int) -> TensorSpec:
    op = "fxquant.transpose_granules"
    spec = tile_spec(op, text)
    wanted = spec.granularity.scale_shape([out_features, in_features])
    shapes = [wanted]
    if spec.granularity.kind in ("tensor", "channel", "token"):
        shapes += [[1, 1], [out_features, 1]]
    if list(t.shape) not in shapes:
        raise ShapeMismatch(op, f"a tensor of shape {list(t.shape)}", f"shape {wanted} for spec {spec}")
    return spec


declare(
    "tile_codes(Tensor codes, str spec) -> Tensor tiles",
    reference=tile_codes,
    fake=_tile_codes_fake,
    backward=no_gradient,
)
declare(
    "untile_codes(Tensor tiles, int in_features, str spec) -> Tensor codes",
    reference=untile_codes,
    fake=_untile_codes_fake,
    backward=no_gradient,
)
declare(
    "transpose_granules(Tensor t, str spec, int out_features, int in_features) -> Tensor transposed",
    reference=transpose_granules,
    fake=_transpose_granules_fake,
    backward=no_gradient,
)
declare(
    "decode_tiles(Tensor tiles, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, int in_features, str spec, "
    "ScalarType dtype) -> Tensor",
    reference=decode_tiles,
    fake=_decode_tiles_fake,
    backward=refuse("decode_tiles"),
)
