"""The panel layout, against its definition written out code by code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.numerics import (
    code_values,
    fits_panels,
    granule_shape,
    pack_granules,
    pack_panels,
    panel_shape,
    unpack_granules,
    unpack_panels,
)
from fxquant.spec import TensorSpec

WIDTHS = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
INTEGERS = [f"int{bits}/channel{scheme}" for bits in range(2, 9) for scheme in ("", "/affine", "/shift")]
FLOATS = [
    f"{name}/channel"
    for name in ("float8_e4m3fn", "float8_e5m2fnuz", "fp7_e3m3", "fp6_e3m2", "fp5_e2m2", "fp4_e2m1", "fp3_e1m1")
]
SHAPES = [(1, 1), (33, 65), (64, 8), (65, 31), (130, 17), (0, 9), (3, 0)]


def random_codes(shape: tuple[int, int], spec: TensorSpec) -> Tensor:
    raw = torch.randint(0, 2**spec.format.bits, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    if spec.code_dtype == torch.int8:
        return (raw.to(torch.int16) - 2 ** (spec.format.bits - 1)).to(torch.int8)
    return raw.view(spec.code_dtype)


def pattern(codes: Tensor, n: int, k: int, spec: TensorSpec) -> int:
    offset = 2 ** (spec.format.bits - 1) if codes.dtype == torch.int8 else 0
    if n >= codes.shape[0] or k >= codes.shape[1]:
        return offset
    raw = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    return int(raw[n, k]) + offset


@pytest.mark.parametrize("text", INTEGERS + FLOATS)
def test_each_bit_stands_where_the_layout_says(text: str) -> None:
    spec = TensorSpec.parse(text)
    codes = random_codes((67, 19), spec)
    packed = pack_panels(codes, spec).tolist()
    for n in range(128):
        for k in (0, 3, 4, 7, 8, 18, 19, 23):
            panel, feature, block = n // 64, n % 64, k // 8
            vector, byte = 4 * (k % 8 // 4) + feature // 16, 4 * (feature % 16) + k % 4
            found, row, below = 0, 0, 0
            for width in WIDTHS[spec.format.bits]:
                held = packed[panel][block][row + vector % width][byte] >> (width * (vector // width))
                found |= (held & (2**width - 1)) << below
                row, below = row + width, below + width
            assert found == pattern(codes, n, k, spec), (n, k)


@pytest.mark.parametrize("text", INTEGERS + FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_the_codes_back(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    codes = random_codes(shape, spec)
    packed = pack_panels(codes, spec)
    assert (packed.dtype, list(packed.shape)) == (torch.uint8, panel_shape(*shape, spec))
    back = unpack_panels(packed, *shape, spec)
    assert back.dtype == codes.dtype
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


def test_eight_bits_are_the_order_of_quads() -> None:
    spec = TensorSpec.parse("int8/channel/affine")
    codes = random_codes((64, 16), spec)
    assert torch.equal(pack_panels(codes, spec).view(4, 64, 4), codes.view(64, 4, 4).transpose(0, 1))


def test_codes_of_any_layout() -> None:
    spec = TensorSpec.parse("int4/channel")
    codes = random_codes((70, 33), spec)
    turned = codes.t().contiguous().t()
    assert torch.equal(pack_panels(turned, spec), pack_panels(codes, spec))


@pytest.mark.parametrize("text", ["int2/channel", "int7/channel", "fp6_e2m3/channel", "float8_e4m3fnuz/channel"])
def test_padding_is_worth_nothing(text: str) -> None:
    """Places outside of the weight hold the pattern whose value is 0."""
    spec = TensorSpec.parse(text)
    whole = unpack_panels(pack_panels(random_codes((1, 1), spec), spec), 64, 8, spec)
    outside = torch.ones(64, 8, dtype=torch.bool)
    outside[0, 0] = False
    values = code_values(spec.format)[whole.view(torch.uint8).int() & (2**spec.format.bits - 1)]
    assert torch.equal(values[outside], torch.zeros(64 * 8 - 1))


# ---- granules


def granule_of(t: Tensor, text: str, n: int, k: int) -> float:
    """What the granularity says belongs to weight [n, k]."""
    kind = TensorSpec.parse(text).granularity
    row = {"block": n // kind.rows if kind.rows else 0}.get(kind.kind, n) if t.shape[0] > 1 else 0
    return float(t[row, k // kind.size if kind.size else 0])


@pytest.mark.parametrize(
    "text",
    [
        "int8/tensor",
        "int8/channel",
        "int8/token",
        "int4/group5",
        "int4/group1000",
        "int8/block128x128",
        "int8/block3x7",
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (65, 31), (130, 17)], ids=str)
def test_granules_stand_by_panel(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    t = torch.rand(spec.granularity.scale_shape(shape), generator=torch.Generator().manual_seed(2)) + 1
    packed = pack_granules(t, spec, *shape)
    assert list(packed.shape) == granule_shape(*shape, spec)
    size = spec.granularity.size or shape[1]
    for n in range(packed.shape[0] * 64):
        for g in range(packed.shape[1]):
            want = granule_of(t, text, n, g * size) if n < shape[0] else 0.0
            assert packed[n // 64, g, n % 64] == want
    rows = unpack_granules(packed, shape[0])
    assert torch.equal(pack_granules(rows, TensorSpec.parse("int8/group1"), shape[0], rows.shape[1]), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
def test_granules_keep_their_dtype(dtype: torch.dtype) -> None:
    spec = TensorSpec.parse("fp4_e2m1/group32")
    t = torch.exp2(torch.arange(66 * 3).remainder(8).view(66, 3).float()).to(dtype)
    packed = pack_granules(t, spec, 66, 70)
    assert packed.dtype == dtype
    assert torch.equal(unpack_granules(packed, 66).float(), t.float())
    assert not packed.view(packed.dtype if packed.dtype.itemsize > 1 else torch.uint8)[1, :, 2:].any()


def test_joined_tensors_have_a_number_a_row() -> None:
    spec = TensorSpec.parse("int8/tensor")
    t = torch.arange(5.0).view(5, 1)
    assert torch.equal(unpack_granules(pack_granules(t, spec, 5, 9), 5), t)


@pytest.mark.parametrize(("text", "fits"), [("int8/channel", True), ("int8/channel1", False), ("int8/sample", False)])
def test_which_granularities_have_panels(text: str, fits: bool) -> None:
    assert fits_panels(TensorSpec.parse(text)) is fits


@pytest.mark.parametrize(
    "text", ["int8/channel", "int4/group128/affine/bf16", "int2/group32/affine/bf16", "int3/group64", "mxfp4", "nvfp4"]
)
def test_packed_bytes_are_what_the_format_promises(text: str) -> None:
    spec = TensorSpec.parse(text)
    shape = (1024, 1024)
    granules = granule_shape(*shape, spec)
    each = spec.scale_dtype.itemsize
    each += {"symmetric": 0, "affine": 1, "shift": spec.scale_dtype.itemsize}[spec.scheme]
    held = torch.Size(panel_shape(*shape, spec)).numel() + torch.Size(granules).numel() * each
    assert abs(held / spec.nbytes(shape) - 1) <= 0.02
