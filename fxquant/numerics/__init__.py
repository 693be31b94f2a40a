"""The oracle: what the numbers are, in plain torch. Kernels only ever change the speed."""

from __future__ import annotations

from fxquant.numerics.bits import pack_bits, pack_codes_rows, packed_bytes, unpack_bits, unpack_codes_rows
from fxquant.numerics.codes import Codes, decode
from fxquant.numerics.encoding import encode
from fxquant.numerics.gather import gather_granules, gather_int8, gather_panels
from fxquant.numerics.given import given_scales, inside_of, rounded_by
from fxquant.numerics.granules import absolute_range, spread, value_range
from fxquant.numerics.packing import QUAD, pack_int8, packed_shape, unpack_int8
from fxquant.numerics.panels import (
    PANEL,
    fits_panels,
    full_features,
    granule_shape,
    pack_granules,
    pack_panels,
    panel_shape,
    rows_spec,
    unpack_granules,
    unpack_panels,
)
from fxquant.numerics.product import MAX_IN_FEATURES, int8_matmul, matmul_float32
from fxquant.numerics.scales import (
    MOST_STEPS,
    Scales,
    affine_scales,
    row_steps,
    scale_and_factor,
    shift_scales,
    smallest_range,
    symmetric_scales,
)
from fxquant.numerics.small_floats import code_values, small_float_bits
from fxquant.numerics.stored_rows import packed_of_rows, rows_of_packed

__all__ = [
    "MAX_IN_FEATURES",
    "MOST_STEPS",
    "PANEL",
    "QUAD",
    "Codes",
    "Scales",
    "absolute_range",
    "affine_scales",
    "code_values",
    "decode",
    "encode",
    "fits_panels",
    "full_features",
    "gather_granules",
    "gather_int8",
    "gather_panels",
    "given_scales",
    "granule_shape",
    "inside_of",
    "int8_matmul",
    "matmul_float32",
    "pack_bits",
    "pack_codes_rows",
    "pack_granules",
    "pack_int8",
    "pack_panels",
    "packed_bytes",
    "packed_of_rows",
    "packed_shape",
    "panel_shape",
    "rounded_by",
    "row_steps",
    "rows_of_packed",
    "rows_spec",
    "scale_and_factor",
    "shift_scales",
    "small_float_bits",
    "smallest_range",
    "spread",
    "symmetric_scales",
    "unpack_bits",
    "unpack_codes_rows",
    "unpack_granules",
    "unpack_int8",
    "unpack_panels",
    "value_range",
]
