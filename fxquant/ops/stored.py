"""rows_of_packed and packed_of_rows: between the layouts of the kernels and the rows of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import InvalidSpec, ShapeMismatch
from fxquant.ops.library import declare, no_gradient
from fxquant.ops.panels import check_panels, panel_spec
from fxquant.spec import TensorSpec

_ROWS, _PACKED = "fxquant.rows_of_packed", "fxquant.packed_of_rows"


def rows_of_packed(
    packed: Tensor, out_features: int, in_features: int, spec: str, layout: str, begin: int, end: int
) -> Tensor:
    """Rows begin <= n < end of the packed codes of a weight [N, K]: uint8 [end - begin, ceil(K * bits / 8)].

    layout: "int8", as int8_pack makes it, or "panels", as pack_panels does. begin and end are multiples of 64, or N.
    """
    parsed = _check_packed(packed, out_features, in_features, spec, layout, begin, end)
    return numerics.rows_of_packed(packed, (out_features, in_features), parsed, layout, begin, end)


def _rows_of_packed_fake(
    packed: Tensor, out_features: int, in_features: int, spec: str, layout: str, begin: int, end: int
) -> Tensor:
    parsed = _check_packed(packed, out_features, in_features, spec, layout, begin, end)
    return packed.new_empty([end - begin, numerics.packed_bytes(in_features, parsed.format.bits)], dtype=torch.uint8)


def packed_of_rows(rows: Tensor, in_features: int, spec: str, layout: str) -> Tensor:
    """The inverse, of all rows, uint8 [N, ceil(K * bits / 8)] at any address -> int8 or uint8, flat."""
    return numerics.packed_of_rows(rows, in_features, _check_rows(rows, in_features, spec, layout), layout)


def _packed_of_rows_fake(rows: Tensor, in_features: int, spec: str, layout: str) -> Tensor:
    parsed = _check_rows(rows, in_features, spec, layout)
    if layout == "int8":
        return rows.new_empty(numerics.packed_shape(rows.shape[0], in_features), dtype=torch.int8)
    return rows.new_empty(numerics.panel_shape(rows.shape[0], in_features, parsed), dtype=torch.uint8)


def _check_packed(
    packed: Tensor, out_features: int, in_features: int, text: str, layout: str, begin: int, end: int
) -> TensorSpec:
    spec = _layout_spec(_ROWS, text, layout)
    if layout == "int8":
        wanted = numerics.packed_shape(out_features, in_features)
        if packed.dtype != torch.int8 or list(packed.shape) != wanted:
            met = f"packed of shape {list(packed.shape)} and dtype {packed.dtype}"
            raise ShapeMismatch(_ROWS, met, f"int8 {wanted} for a weight [{out_features}, {in_features}]")
    else:
        check_panels(_ROWS, packed, out_features, in_features, spec)
    whole = begin % numerics.PANEL == 0 and (end % numerics.PANEL == 0 or end == out_features)
    if not whole or not 0 <= begin <= end <= out_features:
        raise ShapeMismatch(_ROWS, f"rows {begin} to {end} of {out_features}", f"whole panels of {numerics.PANEL}")
    return spec


def _check_rows(rows: Tensor, in_features: int, text: str, layout: str) -> TensorSpec:
    spec = _layout_spec(_PACKED, text, layout)
    wanted = numerics.packed_bytes(in_features, spec.format.bits)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != wanted:
        met = f"rows of shape {list(rows.shape)} and dtype {rows.dtype}"
        raise ShapeMismatch(_PACKED, met, f"uint8 [N, {wanted}] for {in_features} codes of {spec}")
    return spec


def _layout_spec(op: str, text: str, layout: str) -> TensorSpec:
    spec = panel_spec(op, text)
    if layout not in ("int8", "panels"):
        raise InvalidSpec(text, f"{op} knows the layouts 'int8' and 'panels'; met {layout!r}")
    if layout == "int8" and (str(spec.format) != "int8" or spec.scheme != "symmetric"):
        raise InvalidSpec(text, f"the layout 'int8' of {op} holds symmetric int8")
    return spec


declare(
    "rows_of_packed(Tensor packed, int out_features, int in_features, str spec, str layout, int begin, int end) "
    "-> Tensor rows",
    reference=rows_of_packed,
    fake=_rows_of_packed_fake,
    backward=no_gradient,
)
declare(
    "packed_of_rows(Tensor rows, int in_features, str spec, str layout) -> Tensor packed",
    reference=packed_of_rows,
    fake=_packed_of_rows_fake,
    backward=no_gradient,
)
