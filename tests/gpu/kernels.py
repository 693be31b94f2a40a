"""Checks of single kernels on a device: numbers against float64, codes against the reference on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import decode, encode, given_scales, pack_codes_rows, spread, unpack_codes_rows
from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.spec import PRESETS, TensorSpec, group
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels import KERNELS, TritonKernel
from fxquant.triton_kernels.launching import guarded
from fxquant.triton_kernels.operands import (
    DTYPES,
    EmbeddingOperands,
    LinearOperands,
    QuantizeOperands,
    linear_operands,
)
from tests.triton.coded import rounded_weights
from tests.triton.helpers import U, assert_within, code_values, finished64, rounded, weight64

# x, weight: what presets ask for, and what else kernels take.
SIDES = tuple(
    dict.fromkeys(
        [(str(p.activations or ""), str(p.weights)) for p in PRESETS.values()]
        + [
            ("", "int8/group64/affine/bf16"),
            ("", "int4/channel"),
            ("", "int3/group32/shift"),
            ("", "float8_e5m2/channel"),
            ("int8/tensor", "int8/channel"),
            ("int8/token", "int4/group64/affine/bf16"),
            ("float8_e4m3fn/group128", "float8_e4m3fn/block128x128"),
            ("float8_e5m2/token", "float8_e4m3fn/channel"),
        ]
    )
)
SHAPES = ((1, 128, 256), (3, 130, 257), (33, 256, 512), (130, 144, 320), (600, 384, 1024))  # M, N, K
QUANTIZED = (
    "int8/token", "int8/tensor", "int8/token/bf16", "float8_e4m3fn/token", "float8_e5m2/token", "float8_e4m3fn/tensor",
    "float8_e4m3fn/group128", "float8_e4m3fnuz/token", "mxfp8", "mxfp6", "mxfp4", "nvfp4",
)  # fmt: skip
TABLES = (
    "int8/channel",
    "int4/group128/affine/bf16",
    "int3/channel",
    "fp6_e3m2/channel",
    "mxfp8",
    "nvfp4",
    "int8/tensor",
)
# The float8 units of sm89 and sm90 keep 13 bits behind the point of the largest product while they add 32 of them.
_FLOAT8_UNIT = 2.0**-13


def linear_problems(
    sides: tuple[str, str], dtype: str, shapes: tuple[tuple[int, int, int], ...] = SHAPES
) -> list[Problem]:
    return [Problem("linear", *shape, sides[1], sides[0], dtype) for shape in shapes]


def kernels_that_take(problem: Problem, arch: Arch) -> list[TritonKernel]:
    return [k for k in KERNELS.values() if k.op == problem.op and not k.why_not(problem.without_steps(), arch)]


def moved(operands: Any, device: torch.device) -> Any:
    """The operands with every tensor on the device."""
    there = {
        field.name: value.to(device)
        for field in dataclasses.fields(operands)
        if isinstance(value := getattr(operands, field.name), Tensor)
    }
    return dataclasses.replace(operands, **there)


def check_linear(
    problem: Problem,
    config: KernelConfig,
    arch: Arch,
    device: torch.device,
    *,
    activation: str = "",
    residual: bool = False,
) -> None:
    """A kernel's y is within the bound of a float32 sum of K products, epilogue and rounding, of the float64 one."""
    made = linear_operands(problem, "cpu")
    extra = torch.randn(problem.m, problem.n).to(made.dtype) if residual else None
    made = dataclasses.replace(made, activation=activation, residual=extra)
    x, weight = _activation64(made), _weight64(made)
    products, size = x @ weight.t(), x.abs() @ weight.abs().t()
    y64 = finished64(products, made)
    bias = 0 if made.bias is None else made.bias.double().abs()
    before = (problem.k + 16) * 2 * _unit(made, arch) * size + 4 * U * (size + bias)
    if "SLAB" in config.meta:
        before = before + rounded_weights(made)
    bound = 1.2 * before + (2.0**-19 * (products.abs() + bias + 1) if activation else 0)  # no slope is above 1.13
    with guarded():
        y = KERNELS[config.kernel].run(moved(made, device), config)
    assert_within(y.cpu(), y64, rounded(bound + U * y64.abs(), y64, made.dtype))


def _unit(operands: LinearOperands, arch: Arch) -> float:
    float8 = operands.x_spec.startswith("float8") and operands.spec.startswith("float8")
    return _FLOAT8_UNIT if float8 and arch.name in ("sm89", "sm90") else U


def _weight64(operands: LinearOperands) -> Tensor:
    spec = TensorSpec.parse(operands.spec)
    x_spec = TensorSpec.parse(operands.x_spec) if operands.x_spec else None
    if not scaled_by_blocks(spec, x_spec):
        return weight64(operands)
    return _decoded64(operands.tiles, operands.scale, operands.tensor_scale, spec, operands.in_features)


def _activation64(operands: LinearOperands) -> Tensor:
    if not operands.x_spec or operands.x_scale is None:
        return operands.x.double()
    spec = TensorSpec.parse(operands.x_spec)
    return _decoded64(operands.x, operands.x_scale, operands.x_tensor_scale, spec, operands.in_features)


def _decoded64(codes: Tensor, scale: Tensor, whole: Tensor | None, spec: TensorSpec, width: int) -> Tensor:
    plain = unpack_codes_rows(codes, spec, width) if spec.format.bits == 4 or codes.dtype == torch.uint8 else codes
    scales = scale.float().double() if whole is None else scale.float().double() * whole.double()
    along = group(spec.granularity.size) if spec.granularity.size else spec.granularity
    return code_values(plain, spec) * spread(scales, plain.shape, along)


def check_quantize(x: Tensor, spec: str, config: KernelConfig, device: torch.device) -> None:
    """Codes, scales and tensor scale equal the CPU reference's, bit for bit."""
    want = quantize(x, TensorSpec.parse(spec))
    with guarded():
        codes, scale, whole = KERNELS[config.kernel].run(QuantizeOperands(x.to(device), spec), config)
    assert_same_bits(scale, want.scale)
    assert_same_bits(whole, want.tensor_scale)
    assert_same_bits(codes, want.codes)


def check_static(x: Tensor, spec: str, number: float, config: KernelConfig, device: torch.device) -> None:
    """Codes under a scale that is given, and that scale for each row."""
    given = torch.tensor([[number]])
    want = encode(x, given_scales(given), TensorSpec.parse(spec)).codes
    operands = QuantizeOperands(x.to(device), spec, scale=given.to(device))
    codes, scale, _ = KERNELS[config.kernel].run(operands, config)
    assert_same_bits(codes, want)
    assert torch.equal(scale.cpu(), given.expand(x.shape[0], 1))


def check_normed(x: Tensor, norm: str, config: KernelConfig, device: torch.device) -> None:
    """Behind a norm: each value within half a step of int8 and two units in the last place of x's dtype."""
    torch.manual_seed(1)
    weight = torch.randn(x.shape[1]).to(x.dtype)
    bias = torch.randn(x.shape[1]).to(x.dtype) if norm == "layernorm" else None
    operands = QuantizeOperands(x, "int8/token", norm, weight, bias, 1e-5)
    codes, scale, _ = KERNELS[config.kernel].run(moved(operands, device), config)
    width = [x.shape[1]]
    if norm == "rmsnorm":
        want = torch.nn.functional.rms_norm(x.double(), width, weight.double(), 1e-5)
    else:
        assert bias is not None
        want = torch.nn.functional.layer_norm(x.double(), width, weight.double(), bias.double(), 1e-5)
    step, unit = scale.cpu().double(), torch.finfo(x.dtype).eps
    error = (codes.cpu().double() * step - want).abs()
    assert (error <= 0.5 * step * (1 + 2.0**-20) + (2 * unit + 2.0**-20) * (want.abs() + 1)).all()


def check_embedding(spec: str, dtype: torch.dtype, config: KernelConfig, device: torch.device) -> None:
    """Rows equal those of the decoded table."""
    torch.manual_seed(0)
    parsed, width = TensorSpec.parse(spec), 200
    codes, scale, zero, whole = quantize(torch.randn(37, width), parsed)
    indices = torch.tensor([3, 0, 36, 3, 17])
    operands = EmbeddingOperands(indices, pack_codes_rows(codes, parsed), scale, width, spec, dtype, zero, whole)
    with guarded():
        got = KERNELS[config.kernel].run(moved(operands, device), config)
    assert torch.equal(got.cpu(), decode(codes, scale, zero, parsed, dtype, whole)[indices])


def rows_to_quantize(m: int, k: int, dtype: str) -> Tensor:
    """Random rows, with one of zeros, one of ties, one tiny."""
    torch.manual_seed(m + k)
    x = torch.randn(m, k)
    if m > 4:
        x[1], x[2] = 0, torch.arange(k) % 255 / 2
        x[2, 0], x[3] = 127, x[3] * 1e-6
    return x.to(DTYPES[dtype])


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a half type, [256, columns]: each row has its own range."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = numbers[numbers.isfinite()]
    return finite[: finite.numel() // 256 * 256].view(256, -1)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal down to the bits; of NaN, whether it is one."""
    got = got.cpu()
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    if got.dtype.itemsize == 1:
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
