"""The panel layout, against its definition written out code by code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.numerics import (
    code_values,
    fits_panels,
    full_features,
    granule_shape,
    pack_granules,
    pack_panels,
    panel_shape,
    unpack_bits,
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
SHAPES = [(1, 1), (33, 65), (64, 8), (65, 31), (130, 17), (0, 9), (3, 0), (130, 447), (130, 455)]
NARROW = [
    (n, k) for n in (1, 8, 10, 16, 24, 40, 80, 100, 1000, 4096) for k in (1, 3, 9, 13, 27, 64, 147, 160, 576, 1001)
]


def random_codes(shape: tuple[int, int], spec: TensorSpec) -> Tensor:
    raw = torch.randint(0, 2**spec.format.bits, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    if spec.code_dtype == torch.int8:
        return (raw.to(torch.int16) - 2 ** (spec.format.bits - 1)).to(torch.int8)
    return raw.view(spec.code_dtype)


def pattern(codes: Tensor, n: int, k: int, spec: TensorSpec) -> int:
    offset = 2 ** (spec.format.bits - 1) if codes.dtype == torch.int8 else 0
    if k >= codes.shape[1]:
        return offset
    raw = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    return int(raw[n, k]) + offset


@pytest.mark.parametrize(
    ("n", "k", "unit", "full"),
    [
        (63, 8, 8, 0),
        (64, 8, 8, 64),
        (200, 8, 8, 192),
        (200, 7, 8, 0),
        (200, 55, 8, 192),  # one place beside 55: less than 2 %
        (200, 47, 8, 0),
        (200, 353, 8, 192),  # seven
        (200, 345, 8, 0),
        (200, 47, 4, 0),
        (200, 51, 4, 192),
        (0, 8, 8, 0),
        (64, 0, 8, 64),
    ],
)
def test_which_features_stand_in_full_panels(n: int, k: int, unit: int, full: int) -> None:
    assert full_features(n, k, unit) == full


@pytest.mark.parametrize("text", INTEGERS + FLOATS)
def test_each_bit_of_a_full_panel_stands_where_the_layout_says(text: str) -> None:
    spec = TensorSpec.parse(text)
    codes = random_codes((128, 455), spec)
    packed = pack_panels(codes, spec).view(2, 57, spec.format.bits, 64).tolist()
    for n in range(128):
        for k in (0, 3, 4, 7, 8, 454, 455):
            panel, feature, block = n // 64, n % 64, k // 8
            vector, byte = 4 * (k % 8 // 4) + feature // 16, 4 * (feature % 16) + k % 4
            found, row, below = 0, 0, 0
            for width in WIDTHS[spec.format.bits]:
                held = packed[panel][block][row + vector % width][byte] >> (width * (vector // width))
                found |= (held & (2**width - 1)) << below
                row, below = row + width, below + width
            assert found == pattern(codes, n, k, spec), (n, k)


@pytest.mark.parametrize("text", INTEGERS + FLOATS)
@pytest.mark.parametrize("shape", [(3, 16), (67, 19)], ids=str)
def test_features_of_no_full_panel_are_rows_of_patterns(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    codes, bits = random_codes(shape, spec), spec.format.bits
    rows = unpack_bits(pack_panels(codes, spec).view(shape[0], -1), bits, shape[1])
    assert rows.tolist() == [[pattern(codes, n, k, spec) for k in range(shape[1])] for n in range(shape[0])]


def test_full_panels_come_first() -> None:
    spec = TensorSpec.parse("int5/group16/affine")
    codes = random_codes((150, 16), spec)
    panels, rest = pack_panels(codes[:128], spec), pack_panels(codes[128:], spec)
    assert torch.equal(pack_panels(codes, spec), torch.cat([panels, rest]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_weights_take_what_the_format_promises_and_come_back(bits: int) -> None:
    for scheme in ("", "/affine"):
        spec = TensorSpec.parse(f"int{bits}/channel{scheme}")
        for shape in NARROW:
            codes = random_codes(shape, spec)
            packed = pack_panels(codes, spec)
            assert torch.equal(unpack_panels(packed, *shape, spec), codes)
            promised = shape[0] * ((shape[1] * bits + 7) // 8)
            assert abs(packed.numel() - promised) <= 0.02 * promised, shape


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
def test_what_fills_up_a_full_panel_is_worth_nothing(text: str) -> None:
    spec = TensorSpec.parse(text)
    whole = unpack_panels(pack_panels(random_codes((64, 453), spec), spec), 64, 456, spec)
    values = code_values(spec.format)[whole.view(torch.uint8).int() & (2**spec.format.bits - 1)]
    assert torch.equal(values[:, 453:], torch.zeros(64, 3))


# ---- granules


def granule_of(t: Tensor, text: str, n: int, k: int) -> float:
    """What the granularity says belongs to weight [n, k]."""
    kind = TensorSpec.parse(text).granularity
    row = {"block": n // kind.rows if kind.rows else 0}.get(kind.kind, n) if t.shape[0] > 1 else 0
    return float(t[row, k // kind.size if kind.size else 0])


@pytest.mark.parametrize("text", ["int8/channel", "int8/token", "int4/group5", "int4/group1000"])
@pytest.mark.parametrize("shape", [(1, 1), (65, 31), (130, 17), (128, 9)], ids=str)
def test_granules_stand_by_panel(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    t = torch.rand(spec.granularity.scale_shape(shape), generator=torch.Generator().manual_seed(2)) + 1
    packed = pack_granules(t, spec, *shape)
    assert list(packed.shape) == granule_shape(*shape, spec)
    size = spec.granularity.size or shape[1]
    along = t.shape[1]
    for n in range(shape[0]):
        first, features = n // 64 * 64, min(64, shape[0] - n // 64 * 64)
        for g in range(along):
            assert packed[first * along + g * features + n - first] == granule_of(t, text, n, g * size)
    assert torch.equal(unpack_granules(packed, spec, *shape), t.expand(shape[0], along))


@pytest.mark.parametrize("text", ["int8/tensor", "int8/block128x128", "int8/block3x7"])
@pytest.mark.parametrize("shape", [(1, 1), (65, 31), (130, 17)], ids=str)
def test_numbers_that_rows_share_are_held_once(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    t = torch.rand(spec.granularity.scale_shape(shape), generator=torch.Generator().manual_seed(2)) + 1
    packed = pack_granules(t, spec, *shape)
    assert list(packed.shape) == granule_shape(*shape, spec)
    assert torch.equal(packed, t.flatten())
    assert packed.data_ptr() != t.data_ptr()
    size = spec.granularity.size or shape[1]
    rows = unpack_granules(packed, spec, *shape)
    assert rows.tolist() == [[granule_of(t, text, n, g * size) for g in range(t.shape[1])] for n in range(shape[0])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
def test_granules_keep_their_dtype(dtype: torch.dtype) -> None:
    spec = TensorSpec.parse("fp4_e2m1/group32")
    t = torch.exp2(torch.arange(66 * 3).remainder(8).view(66, 3).float()).to(dtype)
    packed = pack_granules(t, spec, 66, 70)
    assert packed.dtype == dtype
    assert torch.equal(unpack_granules(packed, spec, 66, 70).float(), t.float())


def test_joined_tensors_have_a_number_a_row() -> None:
    spec = TensorSpec.parse("int8/tensor")
    t = torch.arange(5.0).view(5, 1)
    packed = pack_granules(t, spec, 5, 9)
    assert list(packed.shape) == granule_shape(5, 9, spec, joined=True)
    assert torch.equal(unpack_granules(packed, spec, 5, 9), t)


@pytest.mark.parametrize(("text", "fits"), [("int8/channel", True), ("int8/channel1", False), ("int8/sample", False)])
def test_which_granularities_have_panels(text: str, fits: bool) -> None:
    assert fits_panels(TensorSpec.parse(text)) is fits


@pytest.mark.parametrize(
    "text",
    [
        "int8/channel",
        "int4/group128/affine/bf16",
        "int2/group32/affine/bf16",
        "int3/group64",
        "float8_e4m3fn/tensor",
        "int8/block128x128",
        "mxfp4",
        "nvfp4",
        "int4/group32/stepped",
        "int4/group128/stepped",
        "int3/group8/stepped",
        "int2/group12/stepped",
    ],
)
def test_codes_and_granules_take_what_the_format_promises(text: str) -> None:
    spec = TensorSpec.parse(text)
    each = spec.scale_dtype.itemsize
    each += {"symmetric": 0, "affine": 1, "shift": spec.scale_dtype.itemsize}[spec.scheme]
    for shape in [*NARROW, (64, 204), (64, 353), (1024, 1024), *((128, k) for k in range(160, 600))]:
        granules = torch.Size(granule_shape(*shape, spec)).numel()
        held = torch.Size(panel_shape(*shape, spec)).numel() + granules * each
        promised = spec.nbytes(shape)
        assert abs(held - promised) <= max(16, 0.02 * promised), shape
