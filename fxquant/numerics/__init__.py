"""The oracle: what the numbers are, in plain torch. Kernels only ever change the speed."""

from __future__ import annotations

from fxquant.numerics.codes import Codes, decode
from fxquant.numerics.float8 import encode_float8
from fxquant.numerics.granules import (
    absolute_range,
    check_shape,
    combine,
    scale_and_factor,
    scale_shape,
    smallest_range,
    value_range,
)
from fxquant.numerics.integer import encode_affine, encode_symmetric
from fxquant.numerics.packing import BLOCK, QUAD, pack_int8, packed_shape, unpack_int8
from fxquant.numerics.product import MAX_IN_FEATURES, int8_matmul, matmul_float32

__all__ = [
    "BLOCK",
    "MAX_IN_FEATURES",
    "QUAD",
    "Codes",
    "absolute_range",
    "check_shape",
    "combine",
    "decode",
    "encode_affine",
    "encode_float8",
    "encode_symmetric",
    "int8_matmul",
    "matmul_float32",
    "pack_int8",
    "packed_shape",
    "scale_and_factor",
    "scale_shape",
    "smallest_range",
    "unpack_int8",
    "value_range",
]
