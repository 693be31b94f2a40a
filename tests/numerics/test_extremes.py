"""Granules at their ends, for every kind of spec: zero, tiny, all equal, huge, not finite, empty, any width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant import numerics
from fxquant.algorithms import quantize
from fxquant.numerics import Codes, decode
from fxquant.spec import TensorSpec
from tests.twins import U, assert_same_bits, assert_within

INF, NAN = math.inf, math.nan
EVERY_SPEC = [
    *(f"int{bits}/channel" for bits in range(2, 9)),
    *(f"int{bits}/group32/affine" for bits in range(2, 9)),
    *(f"int{bits}/group32/shift" for bits in range(2, 9)),
    *("int8/tensor", "int8/token", "int8/channel-1", "int8/block2x3", "int4/channel/affine", "int4/group32/bf16"),
    *("int4/group32/affine/bf16", "int4/group32/shift/bf16", "int8/group32/e8m0", "int4/group16/e4m3"),
    *("float8_e4m3fn/channel", "float8_e5m2/tensor", "float8_e4m3fnuz/channel", "float8_e5m2fnuz/group32"),
    *("fp6_e3m2/channel", "fp6_e2m3/channel", "fp5_e2m2/group32/bf16", "fp4_e2m1/channel", "fp3_e1m1/channel"),
    *("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "nvfp4"),
]
EVERY = pytest.mark.parametrize("text", EVERY_SPEC)


def decoded(found: Codes, spec: TensorSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    return decode(found.codes, found.scale, found.zero_point, spec, dtype, found.tensor_scale)


def quantized(x: Tensor, text: str) -> tuple[Codes, Tensor]:
    spec = TensorSpec.parse(text)
    found = quantize(x, spec)
    return found, decoded(found, spec)


def weight(columns: int = 100) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, columns) * torch.logspace(-4, 4, 6)[:, None] + 0.2


@EVERY
def test_zeros_stay_zeros(text: str) -> None:
    x = torch.zeros(6, 100)
    _, values = quantized(x, text)
    assert torch.equal(values, x)


@EVERY
def test_a_zero_row_leaves_the_others_alone(text: str) -> None:
    w = weight()
    w[2] = 0.0
    _, values = quantized(w, text)
    if "block" not in text and "channel-1" not in text:
        assert values[2].count_nonzero() == 0
    assert values.isfinite().all()
    assert values[5].count_nonzero() > 0


@EVERY
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_makes_its_granule_nan_and_only_that(text: str, bad: float) -> None:
    spec = TensorSpec.parse(text)
    clean = weight()
    w = clean.clone()
    w[1, 40] = bad
    found, values = quantized(w, text)
    assert values[1, 40].isnan()
    # Where a finite value of the granule stands, too: its code is 0, and its scale is NaN.
    lost = values.isnan()
    raw = found.codes.view(torch.uint8)[lost]
    minus = 1 << (spec.format.bits - 1)
    assert ((raw == 0) | ((raw == minus) & (spec.format.kind == "float"))).all()
    if spec.depends_on_whole:
        assert lost.all()
        return
    assert not lost.all()
    assert torch.equal(values[~lost], quantized(clean, text)[1][~lost])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-24, -14, 0, 15])
def test_half_precision_is_the_float32_of_its_values(text: str, dtype: torch.dtype, exponent: int) -> None:
    """Ranges whose scale, or its reciprocal, no float16 can hold: no NaN, and the numbers of the widened tensor.

    In float16 a value near the largest one may round to infinity, by a coarse format's step beyond it; in float32 not.
    """
    torch.manual_seed(0)
    x = (torch.randn(6, 100).clamp(-1.9, 1.9) * 2.0**exponent).to(dtype)
    spec = TensorSpec.parse(text)
    found, widened = quantize(x, spec), quantize(x.float(), spec)
    for got, want in zip(found, widened, strict=True):
        assert_same_bits(got, want)
    assert decoded(found, spec).isfinite().all()
    assert not decoded(found, spec, dtype).isnan().any()
    if exponent < 15:
        assert decoded(found, spec, dtype).isfinite().all()


@EVERY
@pytest.mark.parametrize("value", [1.0, -3.7, 1e-30, 2.0**-149, -3e38])
def test_all_equal_groups(text: str, value: float) -> None:
    spec = TensorSpec.parse(text)
    x = torch.full((6, 100), value)
    _, values = quantized(x, text)
    assert values.isfinite().all()
    assert torch.equal(values, values[:1, :1].expand(6, 100))
    tiny = abs(value) < 2.0**-126
    if spec.scheme == "shift" and spec.scale == "float32":
        assert torch.equal(values, x)  # the shift holds it exactly
    elif spec.scheme == "shift":
        assert torch.equal(values, x.bfloat16().float())
    elif tiny and spec.scale != "e8m0":
        assert values.count_nonzero() == 0
    elif spec.scale == "float32":
        # The largest code, exactly: the two roundings of scale and product are all there is.
        assert_within(values, x.double(), x.double().abs() * 2 * U)
    elif spec.scale == "bfloat16":
        assert_within(values, x.double(), x.double().abs() * (2.0**-8 + 2 * U))
    elif spec.scale == "e4m3":
        assert_within(values, x.double(), x.double().abs() * 6 * U)  # block scale 448, exact; three roundings
    else:
        top = spec.format.qmax
        # Less than a power of two above a power of two: half a step, or what saturates, 2^(emax+1) against qmax.
        lost = max(0.5 ** (spec.format.mantissa_bits + 1), 1 - top / 2.0 ** (spec.format.largest_exponent + 1))
        step = math.ldexp(1.0, -127) if tiny else 0.0
        assert_within(values, x.double(), x.double().abs() * lost + step)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("ends", [(1.0, 1.1), (-5.5, -5.0), (1000.0, 1001.0), (-1.0, 3.0)])
def test_shift_takes_ranges_without_zero(bits: int, ends: tuple[float, float]) -> None:
    torch.manual_seed(0)
    low, high = ends
    x = torch.rand(3, 64) * (high - low) + low
    x[:, 0], x[:, 1] = low, high
    found, values = quantized(x, f"int{bits}/channel/shift")
    assert found.codes[:, 0].tolist() == [0] * 3
    assert found.codes[:, 1].tolist() == [2**bits - 1] * 3
    assert torch.equal(values[:, 0], x[:, 0])  # code 0 is the lower end exactly
    extent, largest = x[0, 1].double() - x[0, 0].double(), max(abs(low), abs(high))
    # The upper end: difference, scale and product are rounded at the extent's size, the sum at the value's.
    assert_within(values[:, 1], x[:, 1].double(), (3 * U * extent + U * largest).expand(3))
    half = extent / (2**bits - 1) / 2
    assert_within(values, x.double(), (half * (1 + 2.0**-12) + 4 * U * largest).expand(3, 64))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("value", [(1.0, 1.1), (-5.5, -5.0)])
def test_affine_widens_ranges_without_zero(bits: int, value: tuple[float, float]) -> None:
    x = torch.linspace(*value, 50)[None]
    found, values = quantized(x, f"int{bits}/channel/affine")
    top = 2**bits - 1
    assert found.zero_point.item() == (0 if value[0] > 0 else top)
    largest = max(map(abs, value))
    assert_within(found.scale, torch.tensor([[largest / top]]).double(), torch.tensor(2 * U * largest / top).double())
    assert_within(values, x.double(), torch.tensor(largest / top * (0.5 + 4 * U * top)).double())


@EVERY
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_tensors(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    found, values = quantized(torch.empty(shape), text)
    assert found.codes.shape == values.shape == shape
    assert list(found.scale.shape) == spec.granularity.scale_shape(shape)
    assert found.codes.dtype == spec.code_dtype


@EVERY
@pytest.mark.parametrize("columns", [1, 31, 160, 1000, 11008])
def test_any_number_of_columns(text: str, columns: int) -> None:
    spec = TensorSpec.parse(text)
    torch.manual_seed(columns)
    w = torch.randn(3, columns)
    found, values = quantized(w, text)
    assert list(found.scale.shape) == spec.granularity.scale_shape((3, columns))
    if spec.granularity.kind == "group":
        # The last group is on its own: nothing is padded into its range.
        start = (columns - 1) // spec.granularity.size * spec.granularity.size
        if not spec.depends_on_whole:
            assert_same_bits(quantized(w[:, start:].contiguous(), text)[1], values[:, start:].contiguous())
    assert ((values - w).norm() / w.norm()) < 1.0


def test_a_clipped_range_saturates() -> None:
    x = torch.tensor([[10.0, -10.0, 0.5, 1.0]])
    for text in ("int8/channel", "float8_e4m3fn/channel", "fp4_e2m1/channel", "mxfp4", "nvfp4", "int4/channel/bf16"):
        spec = TensorSpec.parse(text)
        scales = numerics.symmetric_scales(torch.tensor([[1.0]]), spec)
        found = numerics.encode(x, scales, spec)
        values = decoded(found, spec)
        assert values[0, 0] == -values[0, 1]
        assert values[0, 0] == decoded(numerics.encode(x[:, :1] * 5, scales, spec), spec)
        assert 0.75 <= values[0, 0] <= 1.0 + 2.0**-8 + U or spec.scale == "e8m0"


def test_a_shift_saturates() -> None:
    for value in (torch.finfo(torch.float32).max, torch.finfo(torch.float32).min):
        found, values = quantized(torch.full((1, 4), value), "int4/channel/shift/bf16")
        assert abs(found.zero_point.item()) == torch.finfo(torch.bfloat16).max
        assert values.isfinite().all()


def test_a_tiny_tensor_counts_as_zero_under_two_levels() -> None:
    # 2688 steps, and 2^9 below the tensor's scale the smallest block scale: 2^(ceil(log2(2688 * 512)) - 126).
    smallest = math.ldexp(1.0, -105)
    x = torch.tensor([[smallest] * 16 + [smallest / 2**20] * 16])
    found, values = quantized(x, "nvfp4")
    assert found.scale.float().tolist() == [[448.0, 2.0**-9]]
    assert values[0, 0] > 0
    found, values = quantized(x * (1 - 2.0**-20), "nvfp4")
    assert found.tensor_scale.item() == 0
    assert values.count_nonzero() == found.codes.count_nonzero() == found.scale.float().count_nonzero() == 0
