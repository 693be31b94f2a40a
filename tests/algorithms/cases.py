"""Specs and tensors that every algorithm is tried on, and errors by granule that share no code with the algorithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.numerics import Codes, decode, spread
from fxquant.spec import TensorSpec

SPECS = [
    *(f"int{bits}/group32{scheme}" for bits in range(2, 9) for scheme in ("", "/affine/bf16", "/shift")),
    *("int8/channel", "int4/channel", "int4/channel1", "int3/channel-1/affine", "int4/tensor", "int5/tensor/shift"),
    *(
        "int8/token",
        "int4/token/affine",
        "int8/sample",
        "int4/block8x16",
        "int4/block7x10/affine",
        "int6/block64x64/bf16",
    ),
    *("int4/group32/stepped", "int3/group7/stepped", "int2/group16/stepped"),
    *("int4/group1", "int4/group7/affine/bf16", "int2/group20/shift/bf16", "int4/group1000/shift"),
    *("float8_e4m3fn/channel", "float8_e5m2/tensor", "float8_e4m3fnuz/group16", "float8_e5m2fnuz/channel/bf16"),
    *("fp6_e3m2/channel", "fp6_e2m3/group32", "fp5_e2m2/channel/bf16", "fp4_e2m1/channel", "fp3_e1m1/group16"),
    *("fp3_e2m0/group16", "fp4_e3m0/token", "fp7_e3m3/block8x8", "fp8_e5m2/tensor"),
    *("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "int8/group32/e8m0", "int4/group10/e8m0"),
    *("nvfp4", "fp4_e2m1/group7/e4m3", "int4/group16/e4m3", "float8_e4m3fn/group16/e4m3"),
]
ALGORITHMS = ("mse", "hqq")


def parsed(text: str) -> TensorSpec:
    return TensorSpec.parse(text)


def plain_name(spec: TensorSpec) -> str:
    return "absmax" if spec.scheme == "symmetric" else "minmax"


def tensors() -> dict[str, Tensor]:
    """[24, 70] or so: what weights look like, and what they should not look like."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(24, 70, generator=g)
    heavy = normal / torch.rand(24, 70, generator=g).clamp(min=1e-3).sqrt()
    outlier = normal.clone()
    outlier[::5, 3] = 60.0
    sparse = normal * (torch.rand(24, 70, generator=g) < 0.1)
    return {
        "normal": normal,
        "heavy tails": heavy,
        "outliers": outlier,
        "far from zero": 1 + normal.abs() / 100,
        "negative only": -normal.abs(),
        "sparse": sparse,
        "constant": torch.full((24, 70), 0.3),
        "zeros": torch.zeros(24, 70),
        "two values": torch.where(normal > 0, 1.0, -0.25),
        "on a grid": (normal * 3).round() / 4,
        "small": normal * 1e-20,
        "tiny": normal * 1e-37,
        "large": heavy * 1e15,
        "huge": normal * 1e37,
        "one column": normal[:, :1].contiguous(),
        "one row": normal[:1].contiguous(),
        "bfloat16": heavy.bfloat16(),
        "float16": (normal * 0.02).half(),
    }


def decoded(found: Codes, spec: TensorSpec) -> Tensor:
    return decode(found.codes, found.scale, found.zero_point, spec, torch.float32, found.tensor_scale)


def errors(x: Tensor, found: Codes, spec: TensorSpec, power: int) -> Tensor:
    """Sum of |error| ** power over each granule, float64 [granules], of what the codes decode to."""
    shape = spec.granularity.scale_shape(x.shape)
    owner = spread(torch.arange(math.prod(shape)).view(shape), x.shape, spec.granularity).expand(x.shape)
    each = (decoded(found, spec).double() - x.double()).abs() ** power
    return torch.zeros(math.prod(shape), dtype=torch.float64).index_add_(0, owner.flatten(), each.flatten())


def same(a: Codes, b: Codes) -> bool:
    """Equal in shape, dtype and every bit."""
    return all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(x: Tensor, y: Tensor) -> bool:
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    return x.numel() == 0 or torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
