"""Rows of a checkpoint by the kernels: the same bits as the reference has by way of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant import numerics
from fxquant.errors import InvalidSpec, ShapeMismatch
from fxquant.ops import reference
from fxquant.spec import TensorSpec

OPS = torch.ops.fxquant
BITS = [
    "int8/channel/affine",
    "int8/group32",
    "int7/channel",
    "int6/channel",
    "fp6_e3m2/channel",
    "int5/channel/affine",
]
BITS += ["int4/group128/affine/bf16", "int4/channel", "fp4_e2m1/group32/e8m0", "int3/channel", "int2/group32"]
BITS += ["float8_e4m3fn/channel", "int2/channel/affine"]
# One too few and one too many for a panel; K around strips of 64 bytes and blocks of 8, with and without filling up.
SHAPES = [(1, 1), (63, 40), (64, 8), (64, 64), (64, 72), (65, 404), (66, 403), (130, 401), (192, 128), (200, 1000)]
SHAPES += [(64, 4096), (128, 1021), (64, 511), (64, 513), (0, 64)]


def codes_of(spec: TensorSpec, shape: tuple[int, int]) -> Tensor:
    """Any codes; every pattern of the bits."""
    torch.manual_seed(0)
    bits = spec.format.bits
    if spec.format.kind == "int" and not spec.has_zero_point:
        return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8).view(spec.code_dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", BITS)
def test_panels_and_rows_are_the_same_bits(kernels: object, text: str, shape: tuple[int, int]) -> None:
    spec = TensorSpec.parse(text)
    codes = codes_of(spec, shape)
    rows, packed = numerics.pack_codes_rows(codes, spec), numerics.pack_panels(codes, spec)
    assert torch.equal(OPS.rows_of_packed(packed, *shape, text, "panels", 0, shape[0]), rows)
    assert torch.equal(OPS.packed_of_rows(rows, shape[1], text, "panels"), packed)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 196), (128, 195)], ids=str)
def test_int8_panels_with_their_sums_and_rows_are_the_same(kernels: object, shape: tuple[int, int]) -> None:
    codes = codes_of(TensorSpec.parse("int8/channel"), shape)
    packed, rows = numerics.pack_int8(codes), codes.view(torch.uint8)
    assert torch.equal(OPS.rows_of_packed(packed, *shape, "int8/channel", "int8", 0, shape[0]), rows)
    made = OPS.packed_of_rows(rows, shape[1], "int8/channel", "int8")
    assert made.dtype is torch.int8
    assert torch.equal(made, packed)


@pytest.mark.parametrize("text", ["int8/channel", "int4/channel", "int4/group32/affine/bf16"])
def test_a_large_weight_is_the_same_in_memory_new_or_used(kernels: object, text: str) -> None:
    spec, shape = TensorSpec.parse(text), (1024, 4096 + 200)
    codes = codes_of(spec, shape)
    rows = numerics.pack_codes_rows(codes, spec)
    layout = "int8" if text == "int8/channel" else "panels"
    wanted = numerics.pack_int8(codes) if layout == "int8" else numerics.pack_panels(codes, spec)
    for _ in range(4):  # whose memory comes from the system, or was another's before
        assert torch.equal(OPS.packed_of_rows(rows, shape[1], text, layout), wanted)
        torch.full_like(wanted, 7)


@pytest.mark.parametrize("code", [-128, 127])
def test_sums_of_the_largest_codes_are_exact(kernels: object, code: int) -> None:
    codes = torch.full((64, 5000), code, dtype=torch.int8)
    made = OPS.packed_of_rows(codes.view(torch.uint8), 5000, "int8/channel", "int8")
    assert torch.equal(made, numerics.pack_int8(codes))


@pytest.mark.parametrize(("begin", "end"), [(0, 64), (64, 64), (64, 192), (192, 200), (128, 200), (0, 200)])
@pytest.mark.parametrize("text", ["int4/channel", "int3/channel"])
def test_some_rows_are_those_of_all(kernels: object, text: str, begin: int, end: int) -> None:
    spec, shape = TensorSpec.parse(text), (200, 400)
    codes = codes_of(spec, shape)
    some = OPS.rows_of_packed(numerics.pack_panels(codes, spec), *shape, text, "panels", begin, end)
    assert torch.equal(some, numerics.pack_codes_rows(codes, spec)[begin:end])


@pytest.mark.parametrize("text", ["int4/channel", "int8/channel/affine", "int6/channel"])
def test_rows_at_any_address_are_read_and_left_as_they_are(kernels: object, text: str) -> None:
    spec, shape = TensorSpec.parse(text), (65, 400)
    rows = numerics.pack_codes_rows(codes_of(spec, shape), spec)
    odd = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape)
    wide = torch.cat([rows, rows], 1)[:, : rows.shape[1]]
    before = odd.clone()
    wanted = numerics.packed_of_rows(rows, shape[1], spec, "panels")
    assert odd.data_ptr() % 4
    assert torch.equal(OPS.packed_of_rows(odd, shape[1], text, "panels"), wanted)
    assert torch.equal(OPS.packed_of_rows(wide, shape[1], text, "panels"), wanted)
    assert torch.equal(odd, before)


@pytest.mark.parametrize("text", ["int4/channel", "int5/channel"])
@pytest.mark.parametrize("rows", [64, 65])
def test_bits_behind_the_last_code_do_not_count(kernels: object, text: str, rows: int) -> None:
    spec, columns = TensorSpec.parse(text), 401
    clean = numerics.pack_codes_rows(codes_of(spec, (rows, columns)), spec)
    dirty = clean.clone()
    dirty[:, -1] |= 0xFF << (columns * spec.format.bits % 8) & 0xFF
    assert not torch.equal(clean, dirty)
    made = OPS.packed_of_rows(dirty, columns, text, "panels")
    assert torch.equal(made, numerics.packed_of_rows(clean, columns, spec, "panels"))


def test_many_threads_give_the_same(kernels: object) -> None:
    spec, shape = TensorSpec.parse("int4/channel"), (1000, 4096)
    rows = numerics.pack_codes_rows(codes_of(spec, shape), spec)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        packed = OPS.packed_of_rows(rows, shape[1], "int4/channel", "panels")
        back = OPS.rows_of_packed(packed, *shape, "int4/channel", "panels", 0, shape[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed, numerics.packed_of_rows(rows, shape[1], spec, "panels"))
    assert torch.equal(back, rows)


def test_schemas_are_the_agreed_ones() -> None:
    assert str(OPS.rows_of_packed.default._schema) == (
        "fxquant::rows_of_packed(Tensor packed, int out_features, int in_features, str spec, str layout, int begin, "
        "int end) -> Tensor rows"
    )
    assert str(OPS.packed_of_rows.default._schema) == (
        "fxquant::packed_of_rows(Tensor rows, int in_features, str spec, str layout) -> Tensor packed"
    )


@pytest.mark.parametrize(("text", "layout"), [("int8/channel", "int8"), ("int3/channel", "panels")])
def test_ops_pass_opcheck(kernels: object, text: str, layout: str) -> None:
    spec, shape = TensorSpec.parse(text), (130, 400)
    rows = numerics.pack_codes_rows(codes_of(spec, shape), spec)
    packed = numerics.packed_of_rows(rows, shape[1], spec, layout)
    torch.library.opcheck(OPS.rows_of_packed.default, (packed, *shape, text, layout, 64, 130))
    torch.library.opcheck(OPS.packed_of_rows.default, (rows, shape[1], text, layout))


REFUSED = [
    ("rows_of_packed", (64 * 200,), (64, 400, "int4/channel", "panels", 0, 63), "rows 0 to 63 of 64"),
    ("rows_of_packed", (64 * 200,), (64, 400, "int4/channel", "panels", 64, 128), "rows 64 to 128 of 64"),
    ("rows_of_packed", (64 * 200 - 1,), (64, 400, "int4/channel", "panels", 0, 64), "12800"),
    ("rows_of_packed", (64 * 200,), (64, 400, "int4/channel", "tiles", 0, 64), "'tiles'"),
    ("rows_of_packed", (64 * 200,), (64, 400, "int4/channel", "int8", 0, 64), "symmetric int8"),
    ("packed_of_rows", (64, 199), (400, "int4/channel", "panels"), "400 codes"),
    ("packed_of_rows", (64, 200), (400, "int4/channel", "tiles"), "'tiles'"),
]


@pytest.mark.parametrize(("name", "shape", "args", "words"), REFUSED)
def test_what_does_not_fit_is_refused(
    kernels: object, name: str, shape: tuple[int, ...], args: tuple[object, ...], words: str
) -> None:
    first = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=words):
        getattr(OPS, name)(first, *args)
    with pytest.raises((InvalidSpec, ShapeMismatch), match=words):
        getattr(reference, name)(first, *args)
