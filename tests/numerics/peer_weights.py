"""Weights as torchao and optimum-quanto dequantize them: `python peer_weights.py OUT` writes {peer: {name: tensor}}.

A program, not a module of tests: importing either package registers classes and loads libraries for the whole process,
with warnings that are errors here.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MX_DTYPES = {"mxfp8": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp4": torch.float4_e2m1fn_x2}


def weight() -> Tensor:
    """float32 [64, 256], rows of different size, a few outliers."""
    torch.manual_seed(0)
    w = torch.randn(64, 256) * torch.logspace(-2, 1, 64)[:, None]
    w[::7, ::31] *= 8
    return w


def torchao_weights(w: Tensor) -> dict[str, Tensor]:
    """Dequantized weights by specs of ours, and packed fp4 codes under '<spec> packed'."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.quantization import quant_primitives as primitives

    found: dict[str, Tensor] = {}
    for name, dtype in MX_DTYPES.items():
        mx = MXTensor.to_mx(w, dtype, 32, scaling_mode=ScaleCalculationMode.FLOOR)
        found[name] = mx.dequantize(torch.float32)
    found["mxfp4 packed"] = to_mx(w, MX_DTYPES["mxfp4"], 32, ScaleCalculationMode.FLOOR)[1].view(torch.uint8)
    nvfp4: Any = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max()))
    found["nvfp4"] = nvfp4.dequantize(torch.float32)
    found["nvfp4 packed"] = nvfp4.qdata.view(torch.uint8)
    row: Any = (1, w.shape[1])
    for name in ("float8_e4m3fn", "float8_e5m2"):
        dtype = getattr(torch, name)
        scale = primitives._choose_scale_float8(w, row, dtype)
        codes = primitives._quantize_affine_float8(w, scale, dtype)
        found[f"{name}/channel"] = primitives._dequantize_affine_float8(codes, scale)
    symmetric: Any = primitives.MappingType.SYMMETRIC
    limits: Any = {"quant_min": -127, "quant_max": 127}
    scale, zero = primitives.choose_qparams_affine(w, symmetric, row, torch.int8, **limits, scale_dtype=torch.float32)
    codes = primitives.quantize_affine(w, row, scale, zero, torch.int8, **limits)
    found["int8/channel"] = primitives.dequantize_affine(codes, row, scale, zero, torch.int8, **limits)
    return found


def quanto_weights(w: Tensor) -> dict[str, Tensor]:
    """Dequantized weights by specs of ours; the optimizers are what quanto's own `quantize` takes."""
    from optimum import quanto
    from optimum.quanto.library.extensions import extension

    # Quanto would build C++ for minutes, to unpack bytes: the codes in their low bits are the first of all, and so on.
    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    extension.get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=unpack)
    found: dict[str, Tensor] = {}
    for bits, kind in ((4, quanto.qint4), (2, quanto.qint2)):
        for size in (32, 64, 128):
            scale, shift = quanto.MaxOptimizer()(w, kind, 0, size)
            quantized = quanto.quantize_weight(w, kind, 0, scale, shift, size, optimized=False)
            found[f"int{bits}/group{size}/shift"] = quantized.dequantize()
    kinds = {"int8": quanto.qint8, "float8_e4m3fn": quanto.qfloat8_e4m3fn, "float8_e5m2": quanto.qfloat8_e5m2}
    for name, kind in kinds.items():
        scale = quanto.AbsmaxOptimizer()(w, kind, 0)
        found[f"{name}/channel"] = quanto.quantize_weight(w, kind, 0, scale, optimized=False).dequantize()
    return found


if __name__ == "__main__":
    torch.save({"torchao": torchao_weights(weight()), "quanto": quanto_weights(weight())}, sys.argv[1])
