"""Weight-only problems whose result is known, and the bound of the others; for the tests of coded_mm and coded_mv."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxquant.spec import TensorSpec
from fxquant.target import KernelConfig, Problem
from fxquant.triton_kernels import TritonKernel
from fxquant.triton_kernels.operands import LinearOperands
from tests.triton.helpers import (
    UNIT,
    U,
    along_k,
    assert_exact,
    assert_within,
    finished64,
    operands_of,
    rounded,
    run_guarded,
    weight64,
    weight_codes,
)
from tests.triton.helpers import code_values as values_of

# A format or two of each kind, every granularity, scheme and type of scale.
EVERY_KIND = (
    "int8/channel", "int8/channel/affine", "int8/group64/bf16", "int4/group128", "int4/channel/shift",
    "int4/group64/affine", "int4/group32/shift/bf16", "int2/group64/affine", "int3/group32", "int5/channel",
    "int6/tensor", "int7/group128/affine", "int4/block32x64", "int4/group96", "int4/group20/affine",
    "int4/group20/shift", "float8_e4m3fn/channel", "float8_e5m2/channel", "float8_e4m3fnuz/group32",
    "float8_e5m2fnuz/channel", "fp6_e3m2/channel", "fp6_e2m3/group64", "fp5_e2m2/group32", "fp4_e2m1/group16/bf16",
    "fp7_e5m1/channel", "mxfp8", "mxfp6", "mxfp4", "nvfp4",
)  # fmt: skip
# So many units of float32 a term of tf32's three products is off: 2**-21.
TF32X3 = 8
SUBNORMAL = 2.0**-25  # half a step of float16's smallest numbers


def scaled_exactly(operands: LinearOperands, seed: int = 0) -> LinearOperands:
    """The same codes under powers of two, with an x of small whole numbers: float32 holds every sum.

    Of formats with more than 3 exponent bits a row of x has a single number: sums of such codes take more bits.
    """
    draw = torch.Generator().manual_seed(seed)
    spec = TensorSpec.parse(operands.spec)
    wide = spec.format.exponent_bits > 3
    powers = torch.randint(-2, 2, operands.scale.shape, generator=draw).sub(4 * wide).float().exp2()
    x = torch.randint(-3, 4, operands.x.shape, generator=draw)
    if wide:
        at = torch.randint(0, x.shape[1], [x.shape[0]], generator=draw)
        x = torch.zeros_like(x).scatter_(1, at[:, None], 3)
    changes = {"x": x.to(operands.x.dtype), "scale": powers.to(operands.scale.dtype)}
    if spec.scheme == "shift" and operands.zero_point is not None:
        shift = torch.randint(-3, 4, operands.scale.shape, generator=draw)
        changes["zero_point"] = shift.to(operands.zero_point.dtype) / 4
    if operands.tensor_scale is not None:
        changes["tensor_scale"] = torch.full_like(operands.tensor_scale, 0.5)
    if operands.bias is not None:
        changes["bias"] = torch.arange(operands.out_features).to(operands.bias.dtype)
    return dataclasses.replace(operands, **changes)


def exact(kernel: TritonKernel, problem: Problem, config: KernelConfig) -> None:
    """The kernel's result is that of float64, rounded to the dtype."""
    operands = scaled_exactly(operands_of(problem))
    y = operands.x.double() @ weight64(operands).T
    want = finished64(y, operands).to(operands.dtype)
    assert_exact(run_guarded(kernel.run, operands, config), want)


def within_bound(kernel: TritonKernel, problem: Problem, config: KernelConfig, *, residual: bool = False) -> None:
    """Random x and scales: within what float32 sums of K products may be off, in whatever order they are taken."""
    operands = operands_of(problem, residual=residual, activation="relu" if residual else "", seed=1)
    y64 = finished64(operands.x.double() @ weight64(operands).T, operands)
    terms = operands.in_features + 16 + config.meta.get("SPLIT_K", 1) + TF32X3
    bound = terms * U * (operands.x.double().abs() @ _magnitudes(operands).T)
    for added in (operands.bias, operands.residual):
        if added is not None:
            bound = bound + 2 * U * added.double().abs()
    if "SLAB" in config.meta:
        bound = bound + rounded_weights(operands)
    got = run_guarded(kernel.run, operands, config)
    assert_within(got, y64, rounded(bound, y64, operands.dtype))


def rounded_weights(operands: LinearOperands) -> Tensor:
    """What sums are off, [M, N], if each weight is rounded to the operands' dtype, in float32's steps before that.

    Where a row has one scale (a shift is none), codes are multiplied exactly: 0.
    """
    spec, k = TensorSpec.parse(operands.spec), operands.in_features
    if spec.scheme != "shift" and (not spec.granularity.size or spec.granularity.size >= k):
        return torch.zeros(operands.x.shape[0], operands.out_features, dtype=torch.float64)
    whole = 1.0 if operands.tensor_scale is None else operands.tensor_scale.double().abs()
    error = (UNIT[operands.dtype] + 2 * U) * _magnitudes(operands)
    if operands.dtype == torch.float16:
        error = error + SUBNORMAL * whole
    return operands.x.double().abs() @ error.T


def _magnitudes(operands: LinearOperands) -> Tensor:
    """What products are made of, [N, K]: |weight|, or |code * scale| + |shift|."""
    spec = TensorSpec.parse(operands.spec)
    if spec.scheme != "shift" or operands.zero_point is None:
        return weight64(operands).abs()
    k = operands.in_features
    codes = values_of(weight_codes(operands), spec)
    scale, shift = (along_k(t, spec, k).double() for t in (operands.scale, operands.zero_point))
    return (codes * scale).abs() + shift.abs()
