"""Rows gathered from a packed weight are the rows of the unpacked one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.numerics import (
    gather_granules,
    gather_int8,
    gather_panels,
    pack_granules,
    pack_int8,
    pack_panels,
    unpack_granules,
)
from fxquant.spec import TensorSpec

# Only full panels; rows only, because of N or of K; both; K no multiple of 4 or 8, beside full panels.
SIZES = ((128, 64), (10, 70), (65, 9), (200, 72), (130, 1001), (64, 516))
FORMATS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp6_e3m2", "float8_e4m3fn")
GRANULES = ("tensor", "channel", "group5", "group64", "block3x20", "block128x64")


def some_rows(count: int) -> Tensor:
    """All rows, in no order, and some twice."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return torch.cat([order, order[:3]])


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_codes(size: tuple[int, int]) -> None:
    codes, rows = bytes_of(*size).view(torch.int8), some_rows(size[0])
    assert torch.equal(gather_int8(pack_int8(codes), rows, *size), codes[rows])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "int4/channel/affine", "int8/channel/shift"])
def test_codes_of_every_format(name: str, size: tuple[int, int]) -> None:
    spec = TensorSpec.parse(name if "/" in name else f"{name}/channel")
    raw, rows = bytes_of(*size) & (2**spec.format.bits - 1), some_rows(size[0])
    if spec.code_dtype == torch.int8:
        raw = (raw.view(torch.int8) << (8 - spec.format.bits)) >> (8 - spec.format.bits)  # with their signs
    got = gather_panels(pack_panels(raw.view(spec.code_dtype), spec), rows, *size, spec)
    assert got.dtype == spec.code_dtype
    assert torch.equal(got.view(torch.uint8), raw.view(torch.uint8)[rows])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("granules", GRANULES)
def test_granules(granules: str, size: tuple[int, int]) -> None:
    spec, rows = TensorSpec.parse(f"int4/{granules}"), some_rows(size[0])
    packed = pack_granules(torch.rand(spec.granularity.scale_shape(size)), spec, *size)
    assert torch.equal(gather_granules(packed, rows, spec, *size), unpack_granules(packed, spec, *size)[rows])


def test_granules_of_one_byte_and_of_joined_tensors() -> None:
    size, rows = (200, 64), some_rows(200)
    spec = TensorSpec.parse("fp4_e2m1/group32/e8m0")
    packed = pack_granules(bytes_of(200, 2).view(torch.float8_e8m0fnu), spec, *size)
    got, want = gather_granules(packed, rows, spec, *size), unpack_granules(packed, spec, *size)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)[rows])
    spec, each = TensorSpec.parse("int4/tensor"), torch.rand(200, 1)
    assert torch.equal(gather_granules(pack_granules(each, spec, *size), rows, spec, *size), each[rows])


def test_no_rows() -> None:
    spec, none = TensorSpec.parse("int4/channel"), torch.empty(0, dtype=torch.int64)
    packed = pack_panels(torch.zeros(70, 64, dtype=torch.int8), spec)
    assert gather_panels(packed, none, 70, 64, spec).shape == (0, 64)
    assert gather_int8(pack_int8(torch.zeros(70, 64, dtype=torch.int8)), none, 70, 64).shape == (0, 64)
