"""Which values share a scale: every granularity against an account of its granules, one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import absolute_range, decode, spread, value_range
from fxquant.spec import Granularity, TensorSpec
from tests.twins import assert_same_bits

Index = tuple[int | slice, ...]


def granules(shape: tuple[int, ...], text: str) -> Iterator[tuple[Index, Index]]:
    """(where the values of a granule stand, where its scale stands) for all granules, by the words of the contract."""
    everything = tuple(slice(None) for _ in shape)
    zeros = tuple(0 for _ in shape)
    if text == "tensor":
        yield everything, zeros
    elif text.startswith("channel") or text == "sample":
        axis = int(text.removeprefix("channel").removeprefix("sample") or 0) % len(shape)
        for i in range(shape[axis]):
            yield (
                (*everything[:axis], slice(i, i + 1), *everything[axis + 1 :]),
                (*zeros[:axis], i, *zeros[axis + 1 :]),
            )
    elif text.startswith("block"):
        rows, columns = map(int, text.removeprefix("block").split("x"))
        for i, j in itertools.product(range(math.ceil(shape[0] / rows)), range(math.ceil(shape[1] / columns))):
            yield (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)), (i, j)
    else:
        size = shape[-1] if text == "token" else int(text.removeprefix("group"))
        for lead in itertools.product(*map(range, shape[:-1])):
            for g in range(math.ceil(shape[-1] / size)):
                yield (*lead, slice(g * size, (g + 1) * size)), (*lead, g)


CASES = [
    ((5,), ["tensor", "channel", "token", "sample", "group2", "group9"]),
    ((4, 7), ["tensor", "channel", "channel1", "channel-1", "channel-2", "token", "sample", "group3", "group7"]),
    ((4, 7), ["group100", "block2x3", "block1x7", "block4x1", "block128x128", "block3x2"]),
    ((3, 4, 5), ["tensor", "channel", "channel1", "channel2", "channel-3", "token", "sample", "group2", "group5"]),
    ((2, 3, 2, 5), ["channel1", "channel-1", "sample", "token", "group4", "tensor"]),
    ((1, 1), ["tensor", "channel", "channel1", "token", "sample", "group4", "block2x2"]),
    ((5, 1), ["channel", "channel1", "group3", "token"]),
    ((1, 5), ["channel", "channel1", "group3", "token"]),
]
EACH = pytest.mark.parametrize(("shape", "text"), [(shape, text) for shape, texts in CASES for text in texts])


@EACH
@pytest.mark.parametrize("form", ["int8/{}", "int4/{}/affine", "int5/{}/shift/bf16", "fp6_e3m2/{}", "float8_e5m2/{}"])
def test_a_granule_is_quantized_as_if_it_were_alone(shape: tuple[int, ...], text: str, form: str) -> None:
    torch.manual_seed(len(text))
    x = torch.randn(shape) + 0.3
    spec, alone = TensorSpec.parse(form.format(text)), TensorSpec.parse(form.format("tensor"))
    found = quantize(x, spec)
    assert list(found.scale.shape) == spec.granularity.scale_shape(shape)
    values = decode(*found[:3], spec, torch.float32)
    count = 0
    for where, scale_at in granules(shape, text):
        part = quantize(x[where], alone)
        assert_same_bits(found.codes[where].contiguous(), part.codes)
        assert found.scale[scale_at].item() == part.scale.item()
        if spec.has_zero_point:
            assert found.zero_point[scale_at].item() == part.zero_point.item()
        assert_same_bits(values[where].contiguous(), decode(*part[:3], alone, torch.float32))
        count += part.codes.numel()
    assert count == x.numel()
    assert found.scale.numel() == sum(1 for _ in granules(shape, text))


@EACH
def test_ranges(shape: tuple[int, ...], text: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape) + 0.8
    granularity = Granularity.parse(text)
    low, high = value_range(x, granularity, hold_zero=False)
    for where, at in granules(shape, text):
        assert low[at] == x[where].min()
        assert high[at] == x[where].max()
    held = value_range(x, granularity)
    assert_same_bits(held[0], low.clamp(max=0))
    assert_same_bits(held[1], high.clamp(min=0))
    assert_same_bits(absolute_range(x, granularity), torch.maximum(-held[0], held[1]))


@EACH
def test_spread(shape: tuple[int, ...], text: str) -> None:
    granularity = Granularity.parse(text)
    per_granule = torch.rand(granularity.scale_shape(shape))
    want = torch.empty(shape)
    for where, at in granules(shape, text):
        want[where] = per_granule[at]
    assert torch.equal(spread(per_granule, shape, granularity).expand(shape), want)


@pytest.mark.parametrize(
    "text",
    ["int8/channel", "int8/tensor", "int8/channel-1", "int4/group32/affine", "fp6_e3m2/group7", "mxfp4", "int8/token"],
)
def test_a_tensor_of_several_cache_blocks_is_its_rows(text: str) -> None:
    """The work goes through blocks of rows: where one ends, nothing may be lost or done twice."""
    spec = TensorSpec.parse(text)
    torch.manual_seed(2)
    x = torch.randn(401, 1000)
    x[400, 999], x[0, 0] = 50.0, -50.0
    found = quantize(x, spec)
    if spec.granularity.kind in ("tensor", "channel") and text != "int8/channel":
        amax = x.abs().amax(0, keepdim=True) if "channel" in text else x.abs().max().reshape(1, 1)
        assert_same_bits(found.scale, amax / 127)
        assert_same_bits(found.codes, (x * (127 / amax)).round().to(torch.int8))
        return
    for rows in (slice(0, 130), slice(130, 132), slice(132, 401)):
        part = quantize(x[rows], spec)
        assert_same_bits(found.codes[rows], part.codes)
        assert_same_bits(found.scale[rows], part.scale)
        values = decode(*found[:3], spec, torch.bfloat16)
        assert_same_bits(values[rows], decode(*part[:3], spec, torch.bfloat16))


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        *(((), text) for text in ("token", "channel", "sample", "group2", "channel-1")),
        *((shape, "block2x2") for shape in ((4,), (2, 3, 4), ())),
        *(((3, 4), text) for text in ("channel2", "channel-3")),
    ],
)
def test_granularities_that_a_shape_cannot_have(shape: tuple[int, ...], text: str) -> None:
    assert Granularity.parse(text).unfit(shape)


@EACH
def test_granularities_that_a_shape_can_have(shape: tuple[int, ...], text: str) -> None:
    assert Granularity.parse(text).unfit(shape) is None


def test_a_number_is_a_tensor() -> None:
    spec = TensorSpec.parse("int8/tensor")
    found = quantize(torch.tensor(-2.54), spec)
    assert found.codes.shape == found.scale.shape == ()
    assert found.codes.item() == -127
    assert decode(*found[:3], spec, torch.float64).shape == ()


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_blocks_of_128_on_ragged_shapes(rows: int, columns: int) -> None:
    spec = TensorSpec.parse("float8_e4m3fn/block128x128")
    x = torch.randn(rows, columns)
    found = quantize(x, spec)
    assert found.scale.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    for i, j in itertools.product(*map(range, found.scale.shape)):
        part = x[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
        assert found.scale[i, j] == part.abs().max() / 448
    values: Tensor = decode(*found[:3], spec, torch.float32)
    assert ((values - x).abs() <= x.abs() * 0.0626 + found.scale.max() * 2.0**-10).all()
