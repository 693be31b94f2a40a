"""Formats, granularities and what a tensor takes; how specs are written is in test_spec.py."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fxquant.errors import InvalidSpec, UnknownFormat
from fxquant.spec import ALIASES, CHANNEL, FORMATS, INT8, NAMED_SPECS, Granularity, TensorSpec, number_format
from tests.strategies import ANY_GRANULARITY, tensor_specs

FORMATS_PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers(bits: int) -> None:
    number = number_format(f"int{bits}")
    assert (number.bits, number.kind, number.storage) == (bits, "int", torch.int8)
    assert (number.qmin, number.qmax) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    for scheme in ("affine", "shift"):
        spec = TensorSpec.parse(f"int{bits}/channel/{scheme}")
        assert (spec.qmin, spec.qmax, spec.code_dtype) == (0, 2**bits - 1, torch.uint8)
        assert spec.has_zero_point


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_float8_formats_are_torchs(name: str) -> None:
    number = number_format(name)
    info = torch.finfo(getattr(torch, name))
    assert number.storage == getattr(torch, name)
    assert (number.qmin, number.qmax, number.bits) == (info.min, info.max, info.bits)
    assert not number.is_small_float


def test_any_split_of_3_to_8_bits_is_a_format() -> None:
    for bits in range(3, 9):
        for exponent in range(1, bits):
            name = f"fp{bits}_e{exponent}m{bits - 1 - exponent}"
            number = number_format(name)
            float8 = name in ("fp8_e4m3", "fp8_e5m2")
            assert str(number) == (f"float8_{name[4:]}{'fn' if name == 'fp8_e4m3' else ''}" if float8 else name)
            assert number.is_small_float != float8
            assert number_format(str(number)) == number


@pytest.mark.parametrize("name", ["fp6_e3m3", "fp2_e1m0", "fp9_e4m4", "fp6_e0m5", "fp4", "fp6_e3m2 ", "e8m0", "int1"])
def test_what_is_no_format(name: str) -> None:
    if name == "fp4":
        assert number_format(name) == FORMATS["fp4_e2m1"]  # the one of the names here that is an alias
        return
    with pytest.raises(UnknownFormat, match=re.escape(f"unknown number format {name!r}")):
        number_format(name)


def test_aliases_lead_to_formats() -> None:
    assert set(ALIASES.values()) <= set(FORMATS)
    assert not set(ALIASES) & set(FORMATS)


@settings(deadline=None)
@given(ANY_GRANULARITY)
def test_scales_have_as_many_dimensions_as_the_tensor(granularity: Granularity) -> None:
    for shape in ((4, 6), (3, 4, 5), (7,), ()):
        if granularity.unfit(shape) is None:
            assert len(granularity.scale_shape(shape)) == len(shape)


@pytest.mark.parametrize(
    "granularity",
    [
        {"kind": "row"},
        {"kind": "group", "size": -1},
        {"kind": "tensor", "axis": 1},
        {"kind": "channel", "rows": 2},
        {"kind": "block", "size": 3},
        {"kind": "block", "rows": 3},
        {"kind": "group", "size": 2.5},
        {"kind": "group", "size": True},
        {"kind": "channel", "axis": 1.5},
    ],
)
def test_granularities_that_cannot_be(granularity: dict[str, int]) -> None:
    with pytest.raises(InvalidSpec):
        Granularity(**granularity)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("parts", [("int8", CHANNEL), (INT8, "channel"), (None, None)])
def test_a_spec_takes_a_format_and_a_granularity_not_their_names(parts: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidSpec, match=r"TensorSpec\.parse reads text"):
        TensorSpec(*parts)


# ---- bytes


@pytest.mark.parametrize(
    ("text", "shape", "wanted"),
    [
        ("int8/channel", (10, 7), 70 + 40),
        ("int8/tensor", (), 1 + 4),
        ("int3/channel", (10, 7), 10 * 3 + 40),  # 21 bits are 3 bytes
        ("int4/group128/affine/bf16", (8, 1000), 8 * 500 + 8 * 8 * (2 + 1)),
        ("int4/group128/shift", (8, 1000), 8 * 500 + 8 * 8 * (4 + 4)),
        ("int2/group32/shift/bf16", (8, 33), 8 * 9 + 8 * 2 * (2 + 2)),
        ("fp6_e3m2/channel", (4, 5, 6), 4 * 5 * 5 + 16),
        ("fp5_e2m2/token", (4, 5, 6), 4 * 5 * 4 + 80),
        ("mxfp4", (8, 33), 8 * 17 + 8 * 2),
        ("nvfp4", (8, 33), 8 * 17 + 8 * 3 + 4),
        ("float8_e4m3fn/block128x128", (129, 257), 129 * 257 + 2 * 3 * 4),
        ("int8/sample", (2, 3, 4, 5), 120 + 8),
    ],
)
def test_bytes_that_a_tensor_takes(text: str, shape: tuple[int, ...], wanted: int) -> None:
    assert TensorSpec.parse(text).nbytes(shape) == wanted


@pytest.mark.parametrize(("text", "shape"), [("int8/channel", ()), ("int8/channel5", (3,)), ("fp8/block2x2", (3,))])
def test_a_shape_that_cannot_have_the_granularity_takes_no_bytes(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidSpec, match="needs"):
        TensorSpec.parse(text).nbytes(shape)


@settings(deadline=None)
@given(tensor_specs(ANY_GRANULARITY))
def test_a_large_tensor_takes_the_bits_of_its_format(spec: TensorSpec) -> None:
    shape = (256, 8 * 512)
    if spec.granularity.unfit(shape) is not None:
        return
    scales = math.prod(spec.granularity.scale_shape(shape))
    codes = 256 * 512 * spec.format.bits
    assert codes + scales <= spec.nbytes(shape) <= codes + 8 * scales + 4


@settings(deadline=None)
@given(tensor_specs(ANY_GRANULARITY))
def test_what_depends_on_other_rows(spec: TensorSpec) -> None:
    assert spec.has_tensor_scale == (spec.scale == "e4m3")
    assert spec.depends_on_whole == (spec.has_tensor_scale or spec.granularity.kind == "tensor")
    assert spec.has_zero_point == (spec.scheme in ("affine", "shift"))


# ---- docs/formats.md


def test_the_page_names_every_format_and_spec() -> None:
    for name in (*FORMATS, *NAMED_SPECS):
        assert f"`{name}`" in FORMATS_PAGE or re.fullmatch("int[3-7]", name)


@pytest.mark.parametrize(("name", "text"), re.findall(r"^\| `(\w+)`[^|]*\| `([\w/]+)` \| [\d.]+", FORMATS_PAGE, re.M))
def test_the_page_writes_specs_out(name: str, text: str) -> None:
    assert NAMED_SPECS[name] == text


def test_the_page_lists_all_named_specs() -> None:
    named = re.findall(r"^\| `\w+`[^|]*\| `([\w/]+)` \| ([\d.]+)", FORMATS_PAGE, re.M)
    assert {text for text, _ in named} == set(NAMED_SPECS.values())
    for text, bits in named:
        spec = TensorSpec.parse(text)
        whole = 4 if spec.has_tensor_scale else 0
        assert (spec.nbytes((64, 4096)) - whole) * 8 / (64 * 4096) == float(bits)


@pytest.mark.parametrize(
    ("text", "codes", "scales", "whole"),
    re.findall(r"^\| `([\w/]+)` \| (\d+) MiB \| ([\d.]+ [KM]iB) \| ([\d.]+) MiB \|", FORMATS_PAGE, re.M),
)
def test_the_page_counts_bytes_right(text: str, codes: str, scales: str, whole: str) -> None:
    spec, shape = TensorSpec.parse(text), (4096, 4096)
    number, unit = scales.split()
    of_codes = int(codes) * 2**20
    assert of_codes == math.prod(shape) * spec.format.bits // 8
    rest = spec.nbytes(shape) - of_codes - (4 if spec.has_tensor_scale else 0)
    assert rest == float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
    assert f"{spec.nbytes(shape) / 2**20:.1f}" == whole
