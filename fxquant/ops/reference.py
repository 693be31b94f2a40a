"""The references by name, to be called directly, whatever kernels have been registered since."""

from __future__ import annotations

from fxquant.ops.attention import attention
from fxquant.ops.coded_linear import linear_dynamic, linear_weight_only
from fxquant.ops.convolution import conv_weight_only, int8_conv_dynamic
from fxquant.ops.embedding import embedding_dequantize, embedding_packed
from fxquant.ops.experts import experts_linear, experts_linear_backward, experts_matmul, experts_outer
from fxquant.ops.fake_quantize import fake_quantize, fake_quantize_weight
from fxquant.ops.linear import int8_linear, int8_linear_dynamic, int8_linear_weight_only, int8_pack, int8_unpack
from fxquant.ops.norm_quantize import norm_quantize
from fxquant.ops.panels import decode_weight, pack_granules, pack_panels, unpack_panels
from fxquant.ops.quantize import dequantize, int8_quantize_per_token, quantize_dynamic, quantize_weight
from fxquant.ops.quantize_static import quantize_static
from fxquant.ops.rotary import rotary
from fxquant.ops.shared import shared
from fxquant.ops.static import fake_quantize_static, int8_conv_static, int8_linear_static
from fxquant.ops.storage import decode_rows, pack_rows, unpack_rows
from fxquant.ops.stored import packed_of_rows, rows_of_packed
from fxquant.ops.tiled import tiled_linear, tiled_linear_codes
from fxquant.ops.tiles import decode_tiles, tile_codes, transpose_granules, untile_codes

__all__ = [
    "attention",
    "conv_weight_only",
    "decode_rows",
    "decode_tiles",
    "decode_weight",
    "dequantize",
    "embedding_dequantize",
    "embedding_packed",
    "experts_linear",
    "experts_linear_backward",
    "experts_matmul",
    "experts_outer",
    "fake_quantize",
    "fake_quantize_static",
    "fake_quantize_weight",
    "int8_conv_dynamic",
    "int8_conv_static",
    "int8_linear",
    "int8_linear_dynamic",
    "int8_linear_static",
    "int8_linear_weight_only",
    "int8_pack",
    "int8_quantize_per_token",
    "int8_unpack",
    "linear_dynamic",
    "linear_weight_only",
    "norm_quantize",
    "pack_granules",
    "pack_panels",
    "pack_rows",
    "packed_of_rows",
    "quantize_dynamic",
    "quantize_static",
    "quantize_weight",
    "rotary",
    "rows_of_packed",
    "shared",
    "tile_codes",
    "tiled_linear",
    "tiled_linear_codes",
    "transpose_granules",
    "unpack_panels",
    "unpack_rows",
    "untile_codes",
]
