"""quantize_rows by the interpreter: codes and scales equal the reference's, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant.algorithms import quantize
from fxquant.numerics import encode, given_scales
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.triton_kernels.launching import guarded
from fxquant.triton_kernels.operands import QuantizeOperands
from fxquant.triton_kernels.quantize_rows import QUANTIZE_ROWS

# NaN * 0 and infinity * 0, of granules without usable range, are meant; so is the norm of rows behind the last.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in multiply:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)
SPECS = (
    "int8/token", "float8_e4m3fn/token", "float8_e5m2/token", "float8_e4m3fnuz/token", "float8_e5m2fnuz/token",
    "int8/tensor", "float8_e4m3fn/tensor", "fp6_e3m2/token", "fp4_e2m1/token", "int8/token/bf16",
    "float8_e4m3fn/group128", "int8/group32/bf16", "mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp4", "nvfp4",
)  # fmt: skip
SMALL = (4, 64, 16, 1)  # BLOCK_M, BLOCK_K, PARTS, num_warps: rows of several tiles, also behind a norm
SM90 = ARCHS["sm90"]


def rows_that_matter(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Random rows; of 8 and more also ties, zeros, NaN, infinities, subnormals and the largest numbers."""
    torch.manual_seed(m + k)
    x = torch.randn(m, k)
    if m >= 8:
        x[1] = 0
        x[2, k // 2] = math.nan
        x[3, -1] = -math.inf
        x[4] *= 1e-30
        x[5] = torch.arange(k) % 255 / 2  # ties: with 127 as the largest value the factor is 1
        x[5, 0] = 127
        x[6] *= 1e4
        x[7] = -0.0
    return x.to(dtype)


def problem_of(x: Tensor, spec: str, extra: str = "") -> Problem:
    m, k = x.shape
    return Problem("quantize", m, 0, k, "", spec, str(x.dtype).removeprefix("torch."), extra)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal down to the bits; of NaN, whether it is one."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if got.dtype.itemsize == 1:
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def assert_same(x: Tensor, spec: str, config: KernelConfig) -> None:
    with guarded():
        codes, scale, tensor_scale = QUANTIZE_ROWS.run(QuantizeOperands(x, spec), config)
    want = quantize(x, TensorSpec.parse(spec))
    assert_same_bits(scale, want.scale)
    assert_same_bits(tensor_scale, want.tensor_scale)
    assert_same_bits(codes, want.codes)


@pytest.mark.parametrize("spec", SPECS)
def test_codes_and_scales_are_the_references(spec: str) -> None:
    x = rows_that_matter(9, 200, torch.float16)
    groups = TensorSpec.parse(spec).granularity.size
    assert_same(x, spec, QUANTIZE_ROWS.config(4, max(64, groups), 16, 1))
    finite = x.clone()
    finite[2:4] = 1
    assert_same(finite, spec, QUANTIZE_ROWS.heuristic(problem_of(x, spec), SM90))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["int8/token", "float8_e4m3fn/token", "nvfp4", "mxfp8"])
def test_of_every_dtype(spec: str, dtype: torch.dtype) -> None:
    x = rows_that_matter(9, 100, dtype)
    if spec == "nvfp4":
        x[2:4] = 1
    assert_same(x, spec, QUANTIZE_ROWS.config(2, 64, 8, 1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (17, 63), (5, 257), (0, 33), (3, 0), (0, 0)])
@pytest.mark.parametrize("spec", ["int8/token", "float8_e4m3fn/tensor", "mxfp4", "nvfp4"])
def test_odd_shapes(spec: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    assert_same(torch.randn(*shape).half(), spec, QUANTIZE_ROWS.config(4, 64, 4, 1))


def test_rows_may_lie_apart_and_columns_in_any_order() -> None:
    wide = rows_that_matter(10, 300, torch.float16)
    for x in (wide[:, 7:107], wide[::2, :100], wide.t()):
        assert_same(x, "float8_e4m3fn/token", QUANTIZE_ROWS.config(*SMALL))


def test_a_scale_that_is_given_is_kept_and_rows_that_are_not_finite_are_nan() -> None:
    x = rows_that_matter(9, 100, torch.float16)
    finite = x.isfinite().all(1, keepdim=True)
    for number in (0.03, 0.0, 1e-39, -1.0, math.nan, math.inf):
        for text in ("int8/tensor", "float8_e4m3fn/tensor"):
            scales = given_scales(torch.tensor([[number]]))
            operands = QuantizeOperands(x, text, scale=torch.tensor([[number]]))
            codes, scale, _ = QUANTIZE_ROWS.run(operands, QUANTIZE_ROWS.config(*SMALL))
            assert_same_bits(codes, encode(x, scales, TensorSpec.parse(text)).codes)
            assert_same_bits(scale, torch.where(finite, scales.scale, math.nan))


def normed(x: Tensor, operands: QuantizeOperands) -> Tensor:
    """Torch's own, in float64, rounded once to x's dtype."""
    weight = None if operands.norm_weight is None else operands.norm_weight.double()
    bias = None if operands.norm_bias is None else operands.norm_bias.double()
    if operands.norm == "rmsnorm":
        y = F.rms_norm(x.double(), x.shape[1:], weight, operands.eps)
    else:
        y = F.layer_norm(x.double(), x.shape[1:], weight, bias, operands.eps)
    return y.to(x.dtype)


NORMED = [
    (norm, spec, affine)
    for norm in ("rmsnorm", "layernorm")
    for spec, affine in (
        ("int8/token", True), ("float8_e4m3fn/token", False), ("int8/tensor", True), ("mxfp8", True), ("nvfp4", False)
    )
]  # fmt: skip


@pytest.mark.parametrize("config", [SMALL, (2, 256, 16, 1)], ids=["loops", "fits"])
@pytest.mark.parametrize(("norm", "spec", "affine"), NORMED)
def test_behind_a_norm_exact_sums_give_the_codes_of_torch(
    norm: str, spec: str, affine: bool, config: tuple[int, ...]
) -> None:
    """Rows whose mean, deviation and root are exact: 1 / sqrt(4) and weights of powers of two."""
    torch.manual_seed(0)
    signs = torch.cat([torch.ones(3, 64), -torch.ones(3, 64)], 1)
    x = (2 * torch.stack([row[torch.randperm(128)] for row in signs])).half()
    weight = torch.randint(-2, 3, (128,)).exp2().half() if affine else None
    bias = torch.randn(128).half() if affine and norm == "layernorm" else None
    operands = QuantizeOperands(x, spec, norm, weight, bias, eps=0.0)
    want = quantize(normed(x, operands), TensorSpec.parse(spec))
    got = QUANTIZE_ROWS.run(operands, QUANTIZE_ROWS.config(*config))
    assert_same_bits(got[1], want.scale)
    assert_same_bits(got[0], want.codes)
    assert_same_bits(got[2], want.tensor_scale)


@pytest.mark.parametrize("config", [SMALL, (2, 256, 16, 1)], ids=["loops", "fits"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_behind_a_norm_a_value_is_within_a_step_and_two_units(norm: str, config: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = (torch.randn(7, 200) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1.0, 1.0, 0.0])[:, None] + 1).half()
    weight, bias = torch.randn(200), torch.randn(200).half() if norm == "layernorm" else None
    operands = QuantizeOperands(x, "int8/token", norm, weight, bias, eps=1e-5)
    codes, scale, _ = QUANTIZE_ROWS.run(operands, QUANTIZE_ROWS.config(*config))
    want = normed(x, operands).double()
    error = (codes.double() * scale.double() - want).abs()
    assert (error <= 0.5 * scale.double() * (1 + 2**-20) + 2 * 2.0**-10 * want.abs()).all()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["int8/token", "float8_e4m3fn/tensor", "float8_e4m3fn/group128", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("norm", ["", "rmsnorm", "layernorm"])
@pytest.mark.parametrize("k", [96, 1500, 20000])
def test_every_candidate(k: int, spec: str, norm: str) -> None:
    """Of all architectures."""
    x = rows_that_matter(3, k, torch.float16)
    weight = torch.ones(k) if norm else None
    problem = problem_of(x, spec, norm)
    configs = dict.fromkeys(config for arch in ARCHS.values() for config in QUANTIZE_ROWS.candidates(problem, arch))
    runs = []
    for config in configs:
        if norm:
            runs.append(QUANTIZE_ROWS.run(QuantizeOperands(x, spec, norm, weight, None, 1e-6), config))
        else:
            assert_same(x, spec, config)
    # Sums of rows depend on the tile in their last bits; so does a code near a tie.
    assert all((codes.float() - runs[0][0].float()).abs().mean() < 0.05 for codes, *_ in runs)


def test_says_what_it_does_not_take() -> None:
    x = torch.zeros(1, 256)
    assert "power of two" in QUANTIZE_ROWS.why_not(problem_of(x, "float8_e4m3fn/group48"), SM90)
    assert "not channel" in QUANTIZE_ROWS.why_not(problem_of(x, "float8_e4m3fn/channel"), SM90)
    assert "groupnorm" in QUANTIZE_ROWS.why_not(problem_of(x, "int8/token", "groupnorm"), SM90)
    assert "int4" in QUANTIZE_ROWS.why_not(problem_of(x, "int4/token"), SM90)
    assert all(not QUANTIZE_ROWS.why_not(problem_of(x, spec), SM90) for spec in SPECS)
