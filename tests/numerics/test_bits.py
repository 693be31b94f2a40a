"""Storage packing: each row one bit stream, as many bits a code as the format says; the examples of docs/formats.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.algorithms import quantize
from fxquant.numerics import pack_bits, pack_codes_rows, packed_bytes, unpack_bits, unpack_codes_rows
from fxquant.spec import FORMATS, TensorSpec
from tests.twins import assert_same_bits

FORMATS_PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def stream(codes: list[int], bits: int) -> list[int]:
    """The bytes of a row: one long integer, written down from its low end."""
    number = sum(code << (k * bits) for k, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@settings(deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(0, 41), st.integers(0, 3))
def test_a_row_is_a_little_endian_bit_stream(data: st.DataObject, bits: int, width: int, rows: int) -> None:
    codes = [data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=width, max_size=width)) for _ in range(rows)]
    tensor = torch.tensor(codes, dtype=torch.uint8).view(rows, width)
    packed = pack_bits(tensor, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(width, bits))
    assert packed.tolist() == [stream(row, bits) for row in codes]
    assert_same_bits(unpack_bits(packed, bits, width), tensor)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(5,), (2, 3, 31), (2, 1, 2, 9), (4, 1000), (3, 11008)])
def test_any_number_of_dimensions(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], (shape[-1] * bits + 7) // 8)
    assert_same_bits(unpack_bits(packed, bits, shape[-1]), codes)
    assert_same_bits(
        pack_bits(codes.flatten(0, -2), bits) if len(shape) > 1 else packed,
        packed.view(-1, packed.shape[-1]) if len(shape) > 1 else packed,
    )


SPECS = [
    *(f"{number}/group16" for number in FORMATS),
    *(f"int{bits}/group16/{scheme}/bf16" for bits in range(2, 9) for scheme in ("affine", "shift")),
    *("fp3_e1m1/channel", "fp7_e2m4/channel", "fp8_e3m4/channel", "fp5_e1m3/token", "int8/tensor", "int5/channel-1"),
    *("mxfp8", "mxfp6", "mxfp4", "nvfp4", "int4/block2x3"),
]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("columns", [0, 1, 7, 31, 160])
def test_codes_survive_and_take_the_bytes_that_the_spec_promises(text: str, columns: int) -> None:
    spec = TensorSpec.parse(text)
    torch.manual_seed(columns)
    found = quantize(torch.randn(3, columns) + 0.1, spec)
    packed = pack_codes_rows(found.codes, spec)
    assert packed.shape == (3, (columns * spec.format.bits + 7) // 8)
    assert_same_bits(unpack_codes_rows(packed, spec, columns), found.codes)
    others = sum(t.numel() * t.element_size() for t in (found.scale, found.zero_point, found.tensor_scale))
    assert spec.nbytes((3, columns)) == packed.numel() + others


@pytest.mark.parametrize("text", SPECS)
def test_every_code_survives(text: str) -> None:
    spec = TensorSpec.parse(text)
    every = torch.arange(2**spec.format.bits)
    if spec.code_dtype == torch.int8:
        every = every - 2 ** (spec.format.bits - 1)
    codes = every.to(torch.int8 if spec.code_dtype == torch.int8 else torch.uint8).view(spec.code_dtype)
    assert_same_bits(unpack_codes_rows(pack_codes_rows(codes, spec), spec, len(codes)), codes)


def test_strided_codes_are_packed_by_their_values() -> None:
    codes = torch.randint(0, 8, (9, 5), dtype=torch.uint8).t()
    assert_same_bits(pack_bits(codes, 3), pack_bits(codes.contiguous(), 3))
    packed = torch.stack([pack_bits(codes, 3)] * 2, -1)[..., 0]
    assert_same_bits(unpack_bits(packed, 3, 9), codes.contiguous())
    assert_same_bits(unpack_bits(torch.stack([codes] * 2, -1)[..., 0], 8, 9), codes.contiguous())


# ---- docs/formats.md


def examples() -> list[tuple[str, list[int], list[int]]]:
    """(format, codes, bytes) of the rows of the page's table of worked examples: | `int3` | 1, -2 | `31 00` |."""
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([-0-9, ]+) \| `([0-9a-f ]+)` \|", FORMATS_PAGE.read_text(), re.MULTILINE)
    return [(name, [int(c) for c in codes.split(",")], list(bytes.fromhex(raw))) for name, codes, raw in rows]


def test_the_page_has_an_example_for_each_width() -> None:
    widths = {FORMATS[name].bits for name, _, _ in examples()}
    assert widths == set(range(2, 9))


@pytest.mark.parametrize(("name", "codes", "raw"), examples())
def test_worked_examples(name: str, codes: list[int], raw: list[int]) -> None:
    spec = TensorSpec.parse(f"{name}/tensor")
    tensor = torch.tensor(codes, dtype=torch.int8 if spec.code_dtype == torch.int8 else torch.uint8)
    tensor = tensor.view(spec.code_dtype)
    assert pack_codes_rows(tensor, spec).tolist() == raw
    assert_same_bits(unpack_codes_rows(torch.tensor(raw, dtype=torch.uint8), spec, len(codes)), tensor)
    bits = spec.format.bits
    assert raw == stream([code % 2**bits for code in codes], bits)
