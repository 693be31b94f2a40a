"""Quantized modules: the eager form, which both doors share."""

from __future__ import annotations

from fxquant.nn.attention import QMultiheadAttention
from fxquant.nn.base import QModule
from fxquant.nn.conv import QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d
from fxquant.nn.embedding import QEmbedding
from fxquant.nn.experts import QExperts
from fxquant.nn.linear import QConv1D, QLinear
from fxquant.nn.norm import QLayerNorm, QRMSNorm
from fxquant.nn.registry import quantized_class, register_module, why_none

__all__ = [
    "QConv1D",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QExperts",
    "QLayerNorm",
    "QLinear",
    "QModule",
    "QMultiheadAttention",
    "QRMSNorm",
    "quantized_class",
    "register_module",
    "why_none",
]
