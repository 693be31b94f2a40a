"""One module of each kind that is quantized, what torch makes of its rounded weight, and how far a kernel may be off.

Matrices are made here row by row from what a module computes, not by the code under test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from fxquant.nn import QModule
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.kernels.cpu_helpers import SMALLEST_HALF_STEP, U_OUT, U, assert_within

FORMATS = (
    "int8/channel",
    "int4/group128/affine/bf16",
    "int2/group16/affine",
    "int5/group12/shift",
    "float8_e4m3fn/channel",
    "fp6_e3m2/channel",
    "fp4_e2m1/group32/e8m0",
    "fp4_e2m1/group16/e4m3",
    "int8/tensor",
)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Kind:
    """How to make a float module, and an input for it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(3)
        module = self.make().to(dtype)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias)  # a norm's is 0  # pyright: ignore[reportArgumentType]
        return module

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        if isinstance(self.module(), nn.Embedding):
            return torch.randint(0, 30, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


CONVOLUTIONS = {
    "1d": Kind(lambda: nn.Conv1d(6, 20, 3, stride=2, padding=1), (2, 6, 15)),
    "1d-same": Kind(lambda: nn.Conv1d(6, 20, 5, dilation=2, padding="same"), (2, 6, 15)),
    "2d": Kind(lambda: nn.Conv2d(5, 70, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 5, 9, 8)),
    "2d-no-bias": Kind(lambda: nn.Conv2d(16, 33, 1, bias=False), (2, 16, 5, 4)),
    "2d-valid": Kind(lambda: nn.Conv2d(5, 7, 3, padding="valid"), (2, 5, 6, 6)),
    "2d-uneven": Kind(lambda: nn.Conv2d(5, 7, (2, 4), padding="same"), (2, 5, 6, 7)),
    "2d-reflect": Kind(lambda: nn.Conv2d(5, 7, 3, padding=(1, 2), padding_mode="reflect"), (2, 5, 6, 6)),
    "2d-replicate": Kind(lambda: nn.Conv2d(5, 7, 3, padding=1, stride=2, padding_mode="replicate"), (2, 5, 6, 6)),
    "2d-circular": Kind(lambda: nn.Conv2d(5, 7, (2, 3), padding="same", padding_mode="circular"), (2, 5, 6, 6)),
    "2d-groups": Kind(lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 6, 6)),
    "2d-depthwise": Kind(lambda: nn.Conv2d(8, 8, 3, padding="same", groups=8), (2, 8, 6, 6)),
    "3d": Kind(lambda: nn.Conv3d(3, 9, (2, 3, 3), padding=(0, 1, 1)), (1, 3, 4, 5, 6)),
}
TRANSPOSED = {
    "1d-transposed": Kind(lambda: nn.ConvTranspose1d(6, 5, 4, stride=2, padding=1), (2, 6, 7)),
    "2d-transposed": Kind(lambda: nn.ConvTranspose2d(6, 9, (3, 2), stride=2, output_padding=1), (2, 6, 5, 4)),
    "2d-transposed-groups": Kind(lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, dilation=2), (2, 6, 5, 4)),
    "3d-transposed": Kind(lambda: nn.ConvTranspose3d(4, 3, 2, stride=(1, 2, 2), bias=False), (1, 4, 3, 3, 2)),
}
PRODUCTS = {"linear": Kind(lambda: nn.Linear(70, 33), (3, 70)), **CONVOLUTIONS, **TRANSPOSED}
EMBEDDINGS = {
    "embedding": Kind(lambda: nn.Embedding(30, 70, padding_idx=2), (4, 6)),
    "embedding-sparse": Kind(lambda: nn.Embedding(30, 40, sparse=True), (5,)),
}
NORMS = {
    "layer-norm": Kind(lambda: nn.LayerNorm(24), (3, 5, 24)),
    "layer-norm-plain": Kind(lambda: nn.LayerNorm([5, 24], elementwise_affine=False), (3, 5, 24)),
    "rms-norm": Kind(lambda: nn.RMSNorm(24), (3, 5, 24)),
}
KINDS = {**PRODUCTS, **EMBEDDINGS, **NORMS}


def quantized(module: nn.Module, config: str, **fields: Any) -> QModule:
    """`module` itself, quantized in place: a norm by a rule of its own, an embedding by the weight side."""
    spec = config.partition(" ")[0].removeprefix("w=")
    if isinstance(module, nn.Embedding):
        fields["embeddings"] = spec
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        fields["rules"] = {"m": config[config.index("x=") :] if "x=" in config else "x=int8"}
    report = fxquant.quantize(nn.ModuleDict({"m": module}), config, **fields)
    assert [row.paths for row in report.quantized] == [("m",)], report
    assert isinstance(module, QModule)
    return module


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as rows: all that one output feature is computed with."""
    if not getattr(module, "transposed", False):
        return torch.stack([row.flatten() for row in weight])
    assert isinstance(module.groups, int)
    inputs, outputs = weight.shape[0] // module.groups, weight.shape[1]
    rows = [
        weight[group * inputs : (group + 1) * inputs, output].flatten()
        for group in range(module.groups)
        for output in range(outputs)
    ]
    return torch.stack(rows)


def weight_of(module: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `matrix_of`."""
    if not getattr(module, "transposed", False):
        return matrix.reshape(like.shape)
    assert isinstance(module.groups, int)
    inputs, outputs = like.shape[0] // module.groups, like.shape[1]
    weight = torch.empty_like(like, dtype=matrix.dtype)
    for row, values in enumerate(matrix):
        group, output = divmod(row, outputs)
        weight[group * inputs : (group + 1) * inputs, output] = values.view(inputs, *like.shape[2:])
    return weight


def rounded_matrix(matrix: Tensor, spec: str) -> Tensor:
    """dequantize(quantize_weight(matrix)), by the reference ops."""
    codes, scale, zero_point, whole = reference.quantize_weight(matrix.detach(), spec)
    zeros = zero_point if TensorSpec.parse(spec).has_zero_point else None
    return reference.dequantize(codes, scale, zeros, spec, torch.float32, whole if whole.numel() else None)


def with_rounded_weight(module: nn.Module, spec: str, dtype: torch.dtype) -> nn.Module:
    """A copy of torch's module in `dtype` that holds the rounded weight, which float32 has exactly."""
    assert isinstance(module.weight, Tensor)
    matrix = rounded_matrix(matrix_of(module, module.weight.detach()), spec)
    copied = copy.deepcopy(module).to(dtype)
    copied.weight = nn.Parameter(weight_of(module, matrix, module.weight).to(dtype))
    return copied


def rounded_input(x: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    """x as the activation format has it, per token, sample or tensor; in float64 without a rounding."""
    if not spec:
        return x.to(dtype)
    codes, scale, whole = reference.quantize_dynamic(x, spec)
    if dtype == torch.float64:
        assert TensorSpec.parse(spec).format.kind == "int"
        return codes.double() * scale.double()
    return reference.dequantize(codes, scale, None, spec, dtype, whole if whole.numel() else None)


def exact(module: nn.Module, spec: str, x: Tensor, operands: float = 0.0) -> tuple[Tensor, Tensor]:
    """(what `module` gives of x in float64 with its weight decoded, how far float32 sums may be from it, the output's
    rounding left out).

    A product of K terms whose operands are decoded with a few roundings more: gamma_(K + 5) |x| |w|. `operands`: what
    rounding them to another dtype adds to gamma.
    """
    exactly, sizes = _exactly(module, spec)
    with torch.no_grad():
        y, total = exactly(x.double()), sizes(x.double().abs())
    assert isinstance(module.weight, Tensor)
    return y, (_gamma(matrix_of(module, module.weight).shape[1]) + operands) * total


def exact_gradient(module: nn.Module, spec: str, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the gradient to x, a sum over what each value of x goes into."""
    made: list[Tensor] = []
    for one, size in zip(_exactly(module, spec), (False, True), strict=True):
        x = x.detach().double().requires_grad_()
        one(x).backward(grad.double().abs() if size else grad.double())
        assert x.grad is not None
        made.append(x.grad)
    assert isinstance(module.weight, Tensor)
    return made[0], _gamma(module.weight.numel()) * made[1]


def _exactly(module: nn.Module, spec: str) -> tuple[nn.Module, nn.Module]:
    """Copies in float64: with the rounded weight, and with the absolute values of it and of the bias."""
    exactly = with_rounded_weight(module, spec, torch.float64)
    sizes = copy.deepcopy(exactly)
    with torch.no_grad():
        for parameter in sizes.parameters():
            parameter.abs_()
    return exactly, sizes


def _gamma(terms: int) -> float:
    k = terms + 5
    return k * U / (1 - k * U)


def assert_near(got: Tensor, want: tuple[Tensor, Tensor]) -> None:
    """Within the bound of the sums, and of the output's own rounding."""
    y, bound = want
    out = (U + U_OUT[got.dtype]) * y.abs()
    slack = 1 + 2 * U_OUT[got.dtype] + 2.0**-10
    assert_within(got, y, (bound + out) * slack + SMALLEST_HALF_STEP[got.dtype])
