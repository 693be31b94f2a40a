"""Scales of every kind against plain references, and those of tensors that were joined."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import Codes, decode
from fxquant.spec import TensorSpec
from tests.numerics.twin import BY_NAME, bfloat16, mx_exponent
from tests.twins import U, assert_same_bits, assert_within

F32 = np.float32
INF, NAN = math.inf, math.nan


def decoded(found: Codes, spec: TensorSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    return decode(found.codes, found.scale, found.zero_point, spec, dtype, found.tensor_scale)


def quantized(x: Tensor, text: str) -> tuple[Codes, Tensor]:
    spec = TensorSpec.parse(text)
    found = quantize(x, spec)
    return found, decoded(found, spec)


def weight(columns: int = 100) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, columns) * torch.logspace(-4, 4, 6)[:, None] + 0.2


# ---- bfloat16 scales


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scheme", ["symmetric", "affine", "shift"])
@pytest.mark.parametrize("scale", ["float32", "bf16"])
def test_integers_are_what_the_definition_says(bits: int, scheme: str, scale: str) -> None:
    """Every rounding in numpy's float32, one group at a time."""
    w = weight()
    found, values = quantized(w, f"int{bits}/group32/{scheme}/{scale}")
    stored = bfloat16 if scale == "bf16" else F32
    top = F32(2 ** (bits - 1) - 1 if scheme == "symmetric" else 2**bits - 1)
    for row in range(6):
        for index, start in enumerate(range(0, 100, 32)):
            x = w[row, start : start + 32].numpy()
            low, high = F32(min(x)), F32(max(x))
            if scheme == "affine":
                low, high = min(low, F32(0)), max(high, F32(0))
            extent = F32(max(abs(x))) if scheme == "symmetric" else F32(high - low)
            step = stored(extent / top)
            factor = F32(1) / step if scale == "bf16" else top / extent
            shift = F32(0) if scheme != "shift" else stored(low) if low > 0 else -stored(-low)
            zero = np.clip(np.rint(-low * factor), 0, top) if scheme == "affine" else F32(0)
            codes = np.clip(np.rint((x - shift) * factor) + zero, -top if scheme == "symmetric" else 0, top)
            assert found.scale[row, index].item() == step
            assert found.codes[row, start : start + 32].tolist() == codes.tolist()
            want = (codes.astype(F32) - zero) * step + shift
            assert values[row, start : start + 32].tolist() == want.tolist()
            if scheme != "symmetric":
                assert found.zero_point[row, index].item() == (zero if scheme == "affine" else shift)


def test_dtypes_of_scales_and_zero_points() -> None:
    w = weight(64)
    for text, scale, zero in (
        ("int4/group32/affine/bf16", torch.bfloat16, torch.uint8),
        ("int4/group32/shift/bf16", torch.bfloat16, torch.bfloat16),
        ("int4/group32/shift", torch.float32, torch.float32),
        ("mxfp4", torch.float8_e8m0fnu, None),
        ("nvfp4", torch.float8_e4m3fn, None),
    ):
        found, _ = quantized(w, text)
        assert found.scale.dtype == scale
        assert found.zero_point.dtype == (zero or torch.uint8)
        assert found.zero_point.shape == (found.scale.shape if zero else (0,))
        assert found.tensor_scale.dtype == torch.float32
        assert found.tensor_scale.shape == ((1, 1) if text == "nvfp4" else (0,))


def test_a_bfloat16_scale_saturates() -> None:
    top = torch.finfo(torch.float32).max
    found, values = quantized(torch.tensor([[top, -top]]), "int2/channel/bf16")
    assert found.scale.item() == torch.finfo(torch.bfloat16).max
    assert found.codes.tolist() == [[1, -1]]
    assert values.isfinite().all()


# ---- OCP MX


@pytest.mark.parametrize("text", ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "fp3_e1m1/group32/e8m0"])
@pytest.mark.parametrize("columns", [1, 31, 32, 160])
def test_mx_blocks_are_the_float64_reference(text: str, columns: int) -> None:
    spec = TensorSpec.parse(text)
    number = BY_NAME[spec.format.name]
    torch.manual_seed(columns)
    w = torch.randn(5, columns) * torch.tensor([[1e-40], [1e-30], [1.0], [3e4], [1e38]])
    w[2, ::3] = 0.0
    found, values = quantized(w, text)
    for row in range(5):
        for index, start in enumerate(range(0, columns, 32)):
            x = w[row, start : start + 32].double().tolist()
            exponent = mx_exponent(max(map(abs, x)), number.value(number.top()))
            assert found.scale.view(torch.uint8)[row, index].item() == exponent + 127
            codes = [number.nearest(math.ldexp(value, -exponent)) for value in x]
            got = found.codes.view(torch.uint8)[row, start : start + 32].tolist()
            if max(map(abs, x)) > 0:
                assert got == codes
            assert values[row, start : start + 32].tolist() == [math.ldexp(number.value(c), exponent) for c in codes]


@pytest.mark.parametrize("text", ["mxfp8", "mxfp6", "mxfp4", "int8/group32/e8m0", "int2/group32/e8m0"])
def test_every_power_of_two_is_a_scale(text: str) -> None:
    spec = TensorSpec.parse(text)
    largest = spec.format.largest_exponent
    exponents = range(-127, 128 - largest)
    rows = torch.tensor([[math.ldexp(1.0, min(e + largest, 127))] for e in exponents])
    found, values = quantized(rows, text)
    assert torch.equal(values, rows)
    got = found.scale.view(torch.uint8).flatten()
    assert got.tolist() == [e + 127 for e in exponents]
    # The values of the bytes by a public reference.
    raw = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(raw.view(ml_dtypes.float8_e8m0fnu).astype(F32))
    one = torch.ones(256, 1, dtype=torch.int8)
    every = torch.from_numpy(raw).view(torch.float8_e8m0fnu)[:, None]
    seen = decode(one, every, None, TensorSpec.parse("int8/group32/e8m0"), torch.float32).flatten()
    assert seen[255].isnan()
    assert torch.equal(seen[:255], want[:255])


def test_an_mx_block_of_zeros_has_the_smallest_scale() -> None:
    for text in ("mxfp8", "mxfp6", "mxfp4"):
        found, values = quantized(torch.zeros(2, 40), text)
        assert found.scale.view(torch.uint8).tolist() == [[0, 0], [0, 0]]
        assert found.codes.view(torch.uint8).count_nonzero() == 0
        assert values.count_nonzero() == 0


# ---- NVFP4


@pytest.mark.parametrize("text", ["nvfp4", "int4/group16/e4m3", "fp6_e2m3/group5/e4m3"])
@pytest.mark.parametrize("columns", [1, 31, 100])
def test_two_level_scales_are_what_the_definition_says(text: str, columns: int) -> None:
    spec = TensorSpec.parse(text)
    size, top = spec.granularity.size, F32(spec.qmax)
    torch.manual_seed(columns)
    w = torch.randn(7, columns) * torch.logspace(-6, 3, 7)[:, None]
    w[3] = 0.0
    found, values = quantized(w, text)
    e4m3 = BY_NAME["float8_e4m3fn"]
    whole = F32(w.abs().max().item()) / (top * F32(448))
    assert found.tensor_scale.item() == whole
    for row in range(7):
        for index, start in enumerate(range(0, columns, size)):
            x = w[row, start : start + size].numpy()
            amax = F32(max(abs(x)))
            wanted = min(max(amax / top / whole, F32(2.0**-9)), F32(448)) if amax > 0 else F32(0)
            step = F32(e4m3.value(e4m3.nearest(float(wanted))))
            assert found.scale[row, index].item() == step
            if amax == 0:
                assert values[row, start : start + size].count_nonzero() == 0
                continue
            scaled = x * (F32(1) / (step * whole))
            if spec.format.kind == "int":
                codes = np.clip(np.rint(scaled), -top, top)
            else:
                element = BY_NAME[spec.format.name]
                codes = np.array([element.value(element.nearest(float(v))) for v in scaled], dtype=F32)
            assert values[row, start : start + size].tolist() == (codes * step * whole).tolist()


def test_the_largest_block_scale_of_nvfp4_is_448() -> None:
    found, _ = quantized(weight(64), "nvfp4")
    assert found.scale.float().max() == 448.0
    assert found.scale.float().min() >= 2.0**-9


def test_a_block_far_below_the_tensors_range_keeps_a_scale() -> None:
    found, values = quantized(torch.tensor([[1e-20] * 16 + [1000.0] * 16]), "nvfp4")
    assert found.scale.float().tolist() == [[2.0**-9, 448.0]]
    assert values[0, :16].tolist() == [0.0] * 16
    assert_within(values[0, 16:], torch.full((16,), 1000.0).double(), torch.tensor(1000.0 * 4 * U).double())


@pytest.mark.parametrize("joined", [1, 5])
def test_a_tensor_scale_may_stand_for_each_row(joined: int) -> None:
    spec = TensorSpec.parse("nvfp4")
    found = quantize(weight(40)[:5], spec)
    want = decoded(found, spec)
    rows = found.tensor_scale.expand(joined, 1).contiguous()
    assert_same_bits(decode(found.codes, found.scale, None, spec, torch.float32, rows), want)


# ---- joined tensors


@pytest.mark.parametrize("text", ["int8/tensor", "float8_e4m3fn/tensor", "int4/tensor/affine", "int4/tensor/shift"])
@pytest.mark.parametrize("tail", [(7,), (3, 2)])
def test_scales_of_whole_tensors_may_stand_for_each_row(text: str, tail: tuple[int, ...]) -> None:
    spec = TensorSpec.parse(text)
    parts = [torch.randn(4, *tail), 100 * torch.randn(3, *tail)]
    found = [quantize(part, spec) for part in parts]

    def joined(field: str) -> Tensor:
        return torch.cat(
            [getattr(f, field).expand(len(p), *[1] * len(tail)) for f, p in zip(found, parts, strict=True)]
        )

    codes = torch.cat([f.codes.view(torch.uint8) for f in found]).view(spec.code_dtype)
    zero = joined("zero_point") if spec.has_zero_point else None
    got = decode(codes, joined("scale"), zero, spec, torch.float32)
    assert_same_bits(got, torch.cat([decoded(f, spec) for f in found]))
