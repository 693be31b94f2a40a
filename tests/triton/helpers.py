"""What the tests of Triton kernels share: comparisons that say what is wrong, odd problems, and guarded runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant.numerics import decode
from fxquant.numerics.tiles import unpack_tiles
from fxquant.spec import TENSOR, TensorSpec
from fxquant.target import M_BUCKETS, KernelConfig, Problem
from fxquant.triton_kernels.launching import guarded
from fxquant.triton_kernels.operands import LinearOperands, linear_operands

U = 2.0**-24  # unit roundoff of float32
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a result, past float32's
ODD_SHAPES = ((1, 1, 1), (1, 33, 65), (17, 31, 63), (33, 128, 257), (0, 33, 65))  # M, N, K
SMALLEST = torch.finfo(torch.float16).smallest_normal * 2.0**-10


def gelu_tanh(y: Tensor) -> Tensor:
    """gelu with tanh in a form that does not cancel: (1 + tanh(u)) / 2 is sigmoid(2u)."""
    return y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
}


def edges_of_buckets(largest: int) -> list[int]:
    """Every number of rows up to `largest` that is an end of a bucket, or next to one."""
    near = {bucket + step for bucket in M_BUCKETS for step in (-1, 0, 1)}
    return sorted(m for m in near if 0 < m <= largest)


def assert_exact(got: Tensor, want: Tensor) -> None:
    """Same shape, dtype and values, NaN where NaN is wanted."""
    _assert_alike(got, want)
    assert got.dtype == want.dtype, f"dtype {got.dtype}, want {want.dtype}"
    same = (got == want) | (got.isnan() & want.isnan())
    if not same.all():
        raise AssertionError("not equal: " + _difference(got, want.double(), ~same))


def assert_within(y: Tensor, y64: Tensor, bound: Tensor) -> None:
    """|y - y64| <= bound, element by element; not finite only where y64 is."""
    _assert_alike(y, y64)
    error = (y.double() - y64).abs()
    fine = (error <= bound) | (y.double() == y64) | (y.isnan() & y64.isnan())
    if not fine.all():
        worst = (error / bound.expand_as(error)).nan_to_num(torch.inf).max().item()
        raise AssertionError(f"beyond the bound, at worst {worst:.3g} times: " + _difference(y, y64, ~fine))


def _assert_alike(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"shape {list(got.shape)}, want {list(want.shape)}"


def _difference(got: Tensor, want: Tensor, wrong: Tensor) -> str:
    """Maximal and RMS relative error of all, how many are wrong, where, and what the first of them are."""
    relative = (got.double() - want).abs() / want.abs().clamp_min(SMALLEST)
    rms = relative.square().mean().sqrt().item()
    places = wrong.nonzero()
    shown = [
        f"{tuple(at.tolist())} got {got[tuple(at)].item():.9g} want {want[tuple(at)].item():.9g}" for at in places[:5]
    ]
    ranges = [f"{low}..{high}" for low, high in zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True)]
    return (
        f"relative error max {relative.max().item():.3g}, RMS {rms:.3g}; {len(places)} of {got.numel()} wrong, "
        f"within [{', '.join(ranges)}]: {'; '.join(shown)}"
    )


def problem(
    shape: tuple[int, int, int], weights: str, activations: str = "", dtype: str = "float16", extra: str = ""
) -> Problem:
    """A linear of M, N, K."""
    m, n, k = shape
    return Problem("linear", m, n, k, weights, activations, dtype, extra)


def operands_of(p: Problem, *, bias: bool = True, residual: bool = False, activation: str = "", seed: int = 0) -> Any:
    """Random operands on the CPU, quantized by the reference."""
    made = linear_operands(p, "cpu", bias=bias, seed=seed)
    extra = torch.randn(p.m, p.n).to(made.dtype) if residual else None
    return dataclasses.replace(made, residual=extra, activation=activation)


def strided(operands: LinearOperands, step: int = 3, fill: int = 0x5B) -> LinearOperands:
    """The same operands with x in every other row of a wider tensor, whose rest is large: bytes `fill`."""
    m, width = operands.x.shape
    raw = operands.x.view(torch.uint8)
    wide = torch.full((m, 2, raw.shape[1] + step * operands.x.dtype.itemsize), fill, dtype=torch.uint8)
    wide[:, 0, : raw.shape[1]] = raw
    return dataclasses.replace(operands, x=wide[:, 0].view(operands.x.dtype)[:, :width])


def beside(t: Tensor) -> Tensor:
    """The same bytes one behind where an allocation begins: at no address that a descriptor reads."""
    raw = torch.empty(t.numel() + 1, dtype=torch.uint8)
    return raw[1:].view(t.shape).copy_(t)


def run_guarded(run: Callable[[Any, KernelConfig], Tensor], operands: Any, config: KernelConfig) -> Tensor:
    """What a launcher returns; fails if anything is written behind its results."""
    with guarded():
        return run(operands, config)


def weight_codes(operands: LinearOperands) -> Tensor:
    """Codes of the weight [N, K]."""
    return unpack_tiles(operands.tiles, operands.in_features, TensorSpec.parse(operands.spec))


def weight64(operands: LinearOperands) -> Tensor:
    """The weight [N, K] in float64: code (- zero point) times scale, without a rounding."""
    spec = TensorSpec.parse(operands.spec)
    codes = weight_codes(operands)
    value = code_values(codes, spec)
    scale = along_k(operands.scale, spec, codes.shape[1]).float().double()
    if operands.tensor_scale is not None:
        scale = scale * operands.tensor_scale.double()
    if operands.zero_point is None:
        return value * scale
    zero = along_k(operands.zero_point, spec, codes.shape[1]).double()
    return value * scale + zero if spec.scheme == "shift" else (value - zero) * scale


def along_k(per_granule: Tensor, spec: TensorSpec, in_features: int) -> Tensor:
    """[granules along K, N] -> [N, K]."""
    size = spec.granularity.size or in_features
    raw = per_granule.t().contiguous()
    as_bytes = raw.view(torch.uint8) if raw.dtype.itemsize == 1 else raw
    return as_bytes.repeat_interleave(size, 1)[:, :in_features].contiguous().view(raw.dtype)


def code_values(codes: Tensor, spec: TensorSpec) -> Tensor:
    """What codes stand for under scale 1, in float64; zero points are not taken off."""
    if spec.format.kind == "int":
        return codes.double()
    plain = TensorSpec(spec.format, TENSOR)
    return decode(codes, torch.ones([1] * codes.ndim), None, plain, torch.float32).double()


def finished64(y: Tensor, operands: LinearOperands) -> Tensor:
    """Bias, activation and residual in float64."""
    if operands.bias is not None:
        y = y + operands.bias.double()
    y = ACTIVATIONS[operands.activation](y)
    return y if operands.residual is None else y + operands.residual.double()


def finished32(y: Tensor, operands: LinearOperands) -> Tensor:
    """Bias, activation and residual in float32, and the rounding to the operands' dtype."""
    if operands.bias is not None:
        y = y + operands.bias.float()
    y = ACTIVATIONS[operands.activation](y)
    return (y if operands.residual is None else y + operands.residual.float()).to(operands.dtype)


def rounded(bound: Tensor, y64: Tensor, dtype: torch.dtype) -> Tensor:
    """A bound before the last rounding -> one after it, to `dtype`."""
    tiny = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}[dtype]
    unit = max(UNIT[dtype], U)
    return bound * (1 + unit) + unit * y64.abs() + tiny


def ids(problems: Iterable[Problem]) -> list[str]:
    return [f"{p.m}-{p.n}-{p.k}-{p.activations}-{p.weights}-{p.dtype}" for p in problems]
