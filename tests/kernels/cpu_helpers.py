"""What the tests of the CPU kernels share: problems, exact answers, and comparisons that say where they failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant import cpu_kernels, ops
from fxquant.numerics import pack_granules, pack_panels
from fxquant.spec import TensorSpec

U = 2.0**-24  # unit roundoff of float32
U_OUT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_HALF_STEP = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
SECOND_ORDER = 1.0 + 2.0**-10  # what a first-order bound leaves out, generously

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = {0: "choose", 1: "portable", 2: "avx2", 3: "avx512vnni", 4: "amx", 5: "avxvnni"}

# The smallest, then one off the block sizes: 64 columns, 4 k, tiles of 4 and 6 rows, 256 rows a task.
SHAPES = [
    (1, 1, 1),
    (1, 33, 65),
    (17, 31, 63),
    (33, 128, 257),
    (0, 7, 9),
    (2, 64, 64),
    (4, 65, 66),
    (5, 63, 3),
    (6, 64, 4),
    (7, 129, 5),
    (12, 64, 31),
    (13, 200, 100),
    (96, 40, 20),
    (97, 40, 20),
    (256, 70, 12),
    (259, 70, 12),
    (40, 130, 447),
    (261, 64, 1100),
]


def loaded() -> cpu_kernels.Library:
    """The kernels, or a skip where there is no compiler."""
    library = cpu_kernels.load()
    if library is None:
        pytest.skip("no C++ compiler: the kernels cannot be built")
    assert ops.reference is not None  # the ops are declared: importing fxquant.ops does that
    return library


def has_isa(isa: int) -> bool:
    """Whether this CPU runs the kernels of that number; those of 0 and 1 run everywhere."""
    needs = {2: "avx2", 3: "avx512_vnni", 4: "amx_int8", 5: "avx_vnni"}
    return isa not in needs or bool(torch.cpu.get_capabilities().get(needs[isa]))


def need_isa(isa: int) -> int:
    if not has_isa(isa):
        pytest.skip(f"this CPU lacks {ISAS[isa]}")
    return isa


def multiplies_digits(isa: int) -> bool:
    """Whether products of floats with integers are those of x in fixed point; else they are sums of floats."""
    return isa in (3, 4, 5) or (isa == 0 and (has_isa(3) or has_isa(5)))


def pairs(isa: int, dtype: torch.dtype) -> bool:
    """Whether attention multiplies pairs of bfloat16, and rounds its weights to it."""
    able = torch.cpu.get_capabilities()
    return dtype == torch.bfloat16 and isa in (0, 3, 4) and bool(able.get("avx512_vnni") and able.get("avx512_bf16"))


@dataclass(frozen=True)
class Problem:
    """A quantized linear: weight codes int8 [N, K], scale [N, 1], bias [N], and its packed form."""

    codes: Tensor
    scale: Tensor
    bias: Tensor
    packed: Tensor

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]


def problem(n: int, k: int, *, seed: int, exact: bool) -> Problem:
    """exact: scales are powers of two and the bias a multiple of 2**-10, so that the float32 result has no rounding."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    if exact:
        scale = torch.exp2(torch.randint(-6, -3, (n, 1), generator=generator).float())
        bias = torch.randint(-64, 65, (n,), generator=generator).float()
    else:
        scale = torch.rand(n, 1, generator=generator) * 0.01 + 1e-4
        bias = torch.randn(n, generator=generator)
    return Problem(codes, scale, bias, torch.ops.fxquant.int8_pack(codes))


def through(x: Tensor, isa: int, **around: Any) -> Tensor:
    """x [M, K] times the identity with what stands around it: exact, as floats meet float8 codes as floats."""
    k, spec = x.shape[-1], TensorSpec.parse("float8_e4m3fn/tensor")
    codes, one = torch.eye(k).to(torch.float8_e4m3fn), torch.ones(1, 1)
    packed = pack_panels(codes, spec), pack_granules(one, spec, k, k), None, None, None
    return torch.ops.fxquant.linear_weight_only(x, *packed, k, k, str(spec), x.dtype, isa, **around)


def product64(x_codes: Tensor, weight_codes: Tensor) -> Tensor:
    """The integer product in float64: exact below 2**53."""
    return x_codes.double() @ weight_codes.double().t()


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """|got - want| <= bound, elementwise; says how far off, how many, and where."""
    error = (got.double() - want).abs()
    bad = ~(error <= bound)
    if not bad.any():
        return
    at = tuple(bad.nonzero()[0].tolist())
    worst = (error / bound.clamp_min(1e-300)).max()
    rms = error.square().mean().sqrt()
    raise AssertionError(
        f"{int(bad.sum())} of {bad.numel()} are off, at worst {worst:.3g} times the bound, RMS error {rms:.3g}; "
        f"the first at {at}: got {got[at].item()!r}, want {want[at].item()!r}, bound {bound[at].item():.3g}"
    )


def assert_equal(got: Tensor, want: Tensor) -> None:
    """Bit-equal, NaN where NaN is wanted; says how many differ, and where."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    bad = ~((got == want) | (got.isnan() & want.isnan()))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} differ; the first at {at}: got {got[at].item()!r}, "
            f"want {want[at].item()!r}"
        )
