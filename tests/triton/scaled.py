"""What the tests of kernels of 8-bit codes share: operands, their reference, and the bound of rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from fxquant.numerics.tiles import pack_tiles
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, M_BUCKETS, KernelConfig, Problem
from fxquant.triton_kernels import TritonKernel
from fxquant.triton_kernels.operands import LinearOperands
from tests.triton.helpers import (
    U,
    assert_exact,
    assert_within,
    code_values,
    finished32,
    finished64,
    operands_of,
    rounded,
    run_guarded,
    weight_codes,
)

INT8 = ("int8/channel", "int8/token")
FLOAT8 = ("float8_e4m3fn/channel", "float8_e4m3fn/token")
# Weight and activations: one scale a row of both, one of a whole tensor, both kinds of float8.
KINDS = (
    INT8,
    ("int8/tensor", "int8/tensor"),
    FLOAT8,
    ("float8_e4m3fn/tensor", "float8_e4m3fn/tensor"),
    ("float8_e4m3fn/channel", "float8_e5m2/token"),
)
SMALL_CODES = 8  # products of whole numbers up to this sum up exactly in float32, in whatever order


def exact_operands(p: Problem, **options: object) -> LinearOperands:
    """Operands whose sums of products are whole numbers that float32 holds; scales are what the reference gives."""
    made: LinearOperands = operands_of(p, **options)  # pyright: ignore[reportArgumentType]
    if not made.x.dtype.is_floating_point:
        return made
    generator = torch.Generator().manual_seed(p.m + p.n + p.k)

    def codes(rows: int, dtype: torch.dtype) -> Tensor:
        whole = torch.randint(-SMALL_CODES, SMALL_CODES + 1, (rows, p.k), generator=generator)
        return whole.float().to(dtype)

    spec = TensorSpec.parse(p.weights)
    tiles = pack_tiles(codes(p.n, spec.code_dtype), spec)
    return dataclasses.replace(made, x=codes(p.m, made.x.dtype), tiles=tiles)


def sums64(operands: LinearOperands) -> tuple[Tensor, Tensor]:
    """Sums of products of codes, and of their absolute values, in float64."""
    x = code_values(operands.x, TensorSpec.parse(operands.x_spec))
    w = code_values(weight_codes(operands), TensorSpec.parse(operands.spec))
    return x @ w.t(), x.abs() @ w.abs().t()


def check_exact(kernel: TritonKernel, config: KernelConfig, operands: LinearOperands) -> None:
    """Bit-equal to sum * (x_scale * scale) in float32, as `fxquant.ops.linear` defines it."""
    assert operands.x_scale is not None
    sums, _ = sums64(operands)
    want = finished32(sums.float() * (operands.x_scale * operands.scale.float()), operands)
    assert_exact(run_guarded(kernel.run, operands, config), want)


def check_rounding(kernel: TritonKernel, config: KernelConfig, operands: LinearOperands) -> None:
    """|y - y64| <= gamma_K times the sum of absolute products, for sums in float32; 3u for scaling, u for the bias."""
    assert operands.x_scale is not None
    sums, absolute = sums64(operands)
    k, scale = operands.in_features, operands.x_scale.double() * operands.scale.double()
    unscaled = k * U / (1 - k * U) * absolute if operands.x.dtype.is_floating_point else 0.0
    y64 = finished64(sums * scale, operands)
    bound = scale * unscaled * (1 + 4 * U) + 3 * U * (sums * scale).abs() + U * y64.abs() * (1 + 2.0**-20)
    assert_within(run_guarded(kernel.run, operands, config), y64, rounded(bound, y64, operands.dtype))


def all_candidates(kernel: TritonKernel, weights: str, activations: str) -> list[KernelConfig]:
    """Whatever the kernel may be tried with on any architecture, one of those that are interpreted alike."""
    shapes = [(n, k) for n in (1024, 4096, 12288) for k in (1536, 4096, 14336)]
    found: dict[object, KernelConfig] = {}
    for arch in ARCHS.values():
        for m in M_BUCKETS:
            for n, k in shapes:
                p = Problem("linear", m, n, k, weights, activations, "float16")
                for config in () if kernel.why_not(p, arch) else kernel.candidates(p, arch):
                    found.setdefault(_interpreted(config), config)
    return list(found.values())


def _interpreted(config: KernelConfig) -> object:
    without = ("num_warps", "num_stages", "NUM_PROGRAMS", "SPECIALIZE")
    return tuple(item for item in config.values if item[0] not in without)


def small(config: KernelConfig, weights: str, activations: str, aligned: int = 1) -> Problem:
    """A problem of two tiles each way, with a last one that is hardly begun; K a multiple of `aligned`."""
    m, n, k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    longer = config.meta.get("SPLIT_K", 1) * k + aligned
    return Problem("linear", min(m, 32) + 1, n + 1, longer, weights, activations, "float16")


def ids(kinds: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{activations} x {weights}".replace("/", ".") for weights, activations in kinds]
