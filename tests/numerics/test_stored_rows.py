"""The rows of a checkpoint, made of packed weights without a code a byte in between: the same as by way of codes."""

from __future__ import annotations

import pytest
import torch

from fxquant import numerics
from fxquant.numerics import stored_rows
from fxquant.spec import TensorSpec

# Odd, one too few and one too many for a panel, K with and without filling up.
SHAPES = [(1, 1), (8, 64), (63, 40), (64, 64), (64, 404), (65, 408), (130, 400), (192, 403), (200, 401), (320, 1000)]
PANELS = ["int8/group32", "int8/channel/affine", "int4/group128/affine/bf16", "int4/channel", "fp4_e2m1/group32/e8m0"]
PANELS += ["float8_e4m3fn/channel", "int2/group32", "int3/channel", "fp6_e3m2/channel", "fp5_e2m2/group32"]


def codes_of(spec: TensorSpec, shape: tuple[int, int]) -> torch.Tensor:
    """Any codes; every pattern of the bits."""
    torch.manual_seed(0)
    bits = spec.format.bits
    if spec.format.kind == "int" and not spec.has_zero_point:
        return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8).view(spec.code_dtype)


@pytest.fixture(params=[1 << 18, 1 << 12], ids=["at once", "panel by panel"], autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "_AT_ONCE", request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", PANELS)
def test_panels_and_rows_are_the_same_bits(text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    codes = codes_of(spec, shape)
    rows, packed = numerics.pack_codes_rows(codes, spec), numerics.pack_panels(codes, spec)
    assert torch.equal(numerics.rows_of_packed(packed, shape, spec, "panels", 0, shape[0]), rows)
    assert torch.equal(numerics.packed_of_rows(rows, shape[1], spec, "panels"), packed)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 196), (128, 195)], ids=str)
def test_int8_panels_with_their_sums_and_rows_are_the_same(shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse("int8/channel")
    codes = codes_of(spec, shape)
    packed = numerics.pack_int8(codes)
    assert torch.equal(numerics.rows_of_packed(packed, shape, spec, "int8", 0, shape[0]), codes.view(torch.uint8))
    assert torch.equal(numerics.packed_of_rows(codes.view(torch.uint8), shape[1], spec, "int8"), packed)


@pytest.mark.parametrize(("begin", "end"), [(0, 64), (64, 64), (64, 192), (192, 200), (128, 200)])
def test_some_rows_are_those_of_all(begin: int, end: int) -> None:
    spec, shape = TensorSpec.parse("int4/channel"), (200, 400)
    codes = codes_of(spec, shape)
    packed = numerics.pack_panels(codes, spec)
    some = numerics.rows_of_packed(packed, shape, spec, "panels", begin, end)
    assert torch.equal(some, numerics.pack_codes_rows(codes, spec)[begin:end])


def test_rows_at_an_odd_address_are_read() -> None:
    spec, shape = TensorSpec.parse("int4/channel"), (64, 512)
    codes = codes_of(spec, shape)
    rows = numerics.pack_codes_rows(codes, spec)
    odd = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape)
    assert odd.data_ptr() % 4 == 1
    before = odd.clone()
    assert torch.equal(numerics.packed_of_rows(odd, shape[1], spec, "panels"), numerics.pack_panels(codes, spec))
    assert torch.equal(odd, before)
