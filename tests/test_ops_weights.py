"""fake_quantize_weight and embedding_packed: schemas, references, fakes, gradients, errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.errors import FxQuantError, GradientsNeedTraining, InvalidOption, InvalidSpec, ShapeMismatch
from fxquant.numerics import decode
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.twins import assert_same_bits

OPS = torch.ops.fxquant
SCHEMAS = {
    "fake_quantize_weight": '(Tensor w, str spec, str algorithm="auto") -> Tensor',
    "embedding_packed": "(Tensor indices, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "int num_embeddings, int embedding_dim, str spec, ScalarType dtype) -> Tensor",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What a kernel of activations may serve, and what not.
SPECS = (
    "int8/channel",
    "int8/tensor",
    "int8/group7",
    "int8/channel1",
    "int8/block3x5",
    "int8/channel/bf16",
    "int4/channel",
    "int2/group8/affine",
    "int4/group32/affine/bf16",
    "int3/channel/shift",
    "float8_e4m3fn/channel",
    "fp6_e3m2/tensor",
    "fp4_e2m1/group32/e8m0",
    "fp4_e2m1/group16/e4m3",
)
TABLES = (
    "int8/channel",
    "int8/tensor",
    "int8/group32/affine",
    "int7/channel",
    "int6/group12/shift",
    "int5/block64x20",
    "int4/group32/affine/bf16",
    "int3/channel",
    "int2/group5/shift/bf16",
    "float8_e5m2/channel",
    "fp6_e3m2/block128x16",
    "fp4_e2m1/group32/e8m0",
    "fp4_e2m1/group16/e4m3",
)
# Only full panels; rows only; both; with sums behind an int8 panel; K no multiple of 4 or 8; a single row.
SIZES = ((128, 64), (10, 70), (200, 72), (130, 260), (64, 1001), (1, 9))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Table:
    """A table [N, K], quantized and packed as a linear's weight."""

    def __init__(self, text: str, count: int = 200, width: int = 72) -> None:
        self.spec = TensorSpec.parse(text)
        self.text, self.sizes = str(self.spec), (count, width)
        self.codes, self.scale, self.zero_point, self.tensor_scale = quantize(normal(count, width), self.spec)

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        if self.text == "int8/channel":
            return reference.int8_pack(self.codes), self.scale, None, None, *self.sizes, self.text, dtype
        zero_point = self.granules(self.zero_point) if self.spec.has_zero_point else None
        whole = self.tensor_scale if self.spec.has_tensor_scale else None
        packed = reference.pack_panels(self.codes, self.text)
        return packed, self.granules(self.scale), zero_point, whole, *self.sizes, self.text, dtype

    def granules(self, t: Tensor) -> Tensor:
        return reference.pack_granules(t, self.text, *self.sizes)

    def looked_up(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        whole = self.tensor_scale if self.spec.has_tensor_scale else None
        values = decode(self.codes, self.scale, self.zero_point, self.spec, dtype, whole)
        return torch.nn.functional.embedding(indices, values)


def some_rows(count: int) -> Tensor:
    """Rows of all panels, in no order, some twice."""
    return torch.randint(0, count, (3, 40), generator=torch.Generator().manual_seed(2))


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    round_, look_up = OPS.fake_quantize_weight.default, OPS.embedding_packed.default
    kernel = normal(5, 3, 3, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    return {
        "fake_quantize_weight": (round_, (kernel, "int8/channel")),
        "fake_quantize_weight-hqq": (round_, (normal(6, 20).half(), "int4/group8/affine", "hqq")),
        "fake_quantize_weight-row": (round_, (normal(20), "int4/channel")),
        "fake_quantize_weight-transposed": (round_, (normal(20, 6).t(), "int8/tensor")),
        "fake_quantize_weight-empty": (round_, (normal(0, 6), "int8/channel")),
        "embedding_packed": (look_up, (some_rows(200), *Table("int8/channel").arguments(torch.bfloat16))),
        "embedding_packed-int4": (look_up, (some_rows(200).int(), *Table("int4/group32/affine/bf16").arguments())),
        "embedding_packed-none": (look_up, (some_rows(200)[:0], *Table("int4/channel").arguments())),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(*samples()[name])


@pytest.mark.parametrize("name", list(samples()))
def test_fake_has_shapes_dtypes_and_strides_of_the_reference(name: str) -> None:
    op, args = samples()[name]
    with torch.no_grad():
        real = getattr(reference, op._schema.name.partition("::")[2])(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_the_agreed_ones(name: str) -> None:
    schema = getattr(OPS, name).default._schema
    assert str(schema) == f"fxquant::{name}{SCHEMAS[name]}"
    assert list(inspect.signature(getattr(reference, name)).parameters) == [a.name for a in schema.arguments]


# ---- weights


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("spec", SPECS)
def test_a_weight_becomes_what_its_codes_mean(spec: str, dtype: torch.dtype) -> None:
    for shape in ((6, 20), (5, 4, 3, 2), (20,), (0, 20), (6, 0)):
        w = normal(*shape).to(dtype)
        matrix = w.view(1, 20) if len(shape) == 1 else w.flatten(1)
        codes, scale, zero_point, whole = reference.quantize_weight(matrix, spec)
        want = decode(codes, scale, zero_point, TensorSpec.parse(spec), dtype, whole).view(shape)
        for op in (reference.fake_quantize_weight, OPS.fake_quantize_weight):
            assert_same_bits(op(w, spec), want)


@pytest.mark.parametrize("algorithm", ["mse", "absmax"])
def test_the_algorithm_is_heeded(algorithm: str) -> None:
    w = normal(6, 64)
    codes, scale, zero_point, _ = reference.quantize_weight(w, "int8/channel", algorithm)
    want = reference.dequantize(codes, scale, zero_point, "int8/channel", torch.float32)
    assert_same_bits(OPS.fake_quantize_weight(w, "int8/channel", algorithm), want)
    assert (algorithm == "absmax") == torch.equal(want, OPS.fake_quantize_weight(w, "int8/channel"))


def test_a_granule_of_a_weight_that_is_not_finite_is_nan_throughout() -> None:
    w = normal(6, 20)
    w[2, 3] = torch.inf
    for spec, spoilt in (("int8/channel", 20), ("int4/group5/affine", 5), ("int8/tensor", 120)):
        assert int(OPS.fake_quantize_weight(w, spec).isnan().sum()) == spoilt


def test_the_gradient_passes_straight_through(fresh_dynamo: None) -> None:
    for spec in ("int8/channel", "int4/group5/affine"):
        for run in (lambda w, spec=spec: OPS.fake_quantize_weight(w, spec) * 3,) * 2:
            plain, w = normal(5, 4, 5), normal(5, 4, 5).requires_grad_()
            y = torch.compile(run, backend="aot_eager", fullgraph=True)(w)
            y.backward(plain)
            assert w.grad is not None
            assert_same_bits(w.grad, plain * 3)
            assert_same_bits(y.detach(), run(plain))


# ---- tables


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TABLES)
def test_rows_are_those_of_the_dequantized_table(text: str, dtype: torch.dtype) -> None:
    for count, width in SIZES:
        table, indices = Table(text, count, width), some_rows(count)
        assert_same_bits(OPS.embedding_packed(indices, *table.arguments(dtype)), table.looked_up(indices, dtype))


@pytest.mark.parametrize("text", ["int8/channel", "int4/group32/affine/bf16"])
def test_indices_of_any_shape_and_kind(text: str) -> None:
    table, some = Table(text), some_rows(200)
    for indices in (some, some.int(), some.t(), some[0, 3], some[:0], some[:, :0], some[0].expand(2, 3, 40), some % 64):
        assert_same_bits(OPS.embedding_packed(indices, *table.arguments()), table.looked_up(indices))


@pytest.mark.parametrize("text", ["int8/tensor", "fp4_e2m1/group16/e4m3"])
def test_tables_that_were_joined_keep_a_number_for_each_row(text: str) -> None:
    table, per_row = Table(text), torch.arange(1.0, 201.0).view(200, 1)
    if table.spec.has_tensor_scale:
        table.tensor_scale = per_row
    else:
        table.scale = per_row
    assert_same_bits(OPS.embedding_packed(some_rows(200), *table.arguments()), table.looked_up(some_rows(200)))


@pytest.mark.parametrize("text", ["int8/channel", "int4/channel"])
def test_packed_codes_at_an_odd_address(text: str) -> None:
    """A table mapped from a file stands wherever the file puts it."""
    table = Table(text)
    packed, *rest = table.arguments()
    shifted = torch.cat([packed.new_zeros(1), packed])[1:]
    assert_same_bits(OPS.embedding_packed(some_rows(200), shifted, *rest), table.looked_up(some_rows(200)))


@pytest.mark.parametrize("text", ["int8/channel", "int4/channel"])
@pytest.mark.parametrize("index", [200, -1])
def test_an_index_outside_of_the_table_is_an_index_error(index: int, text: str) -> None:
    for op in (reference.embedding_packed, OPS.embedding_packed):
        with pytest.raises(IndexError, match="out of range for a table of 200 rows"):
            op(torch.tensor([3, index]), *Table(text).arguments())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_lookup_compiles_in_one_graph(dynamic: bool, fresh_dynamo: None) -> None:
    table = Table("int8/channel")
    compiled = torch.compile(OPS.embedding_packed, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (2, 3):
        indices = some_rows(200)[:rows]
        assert_same_bits(compiled(indices, *table.arguments()), table.looked_up(indices))


def test_a_gradient_to_the_table_is_refused() -> None:
    packed, scale, *rest = Table("int8/channel").arguments()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.embedding_packed: a gradient"):
        OPS.embedding_packed(some_rows(200), packed, scale.requires_grad_(), *rest).sum().backward()


# ---- errors: the same from reference and fake


def refused(name: str, args: tuple[Any, ...], error: type[FxQuantError], words: str) -> None:
    with pytest.raises(error) as caught:
        getattr(reference, name)(*args)
    assert words in str(caught.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error) as caught:
        getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert words in str(caught.value)


def test_fake_quantize_weight_refuses_what_does_not_fit() -> None:
    op = "fake_quantize_weight"
    refused(op, (torch.ones(3, 4, dtype=torch.int8), "int8/channel"), ShapeMismatch, "met a weight of 2 dimensions")
    refused(op, (torch.tensor(1.0), "int8/channel"), ShapeMismatch, "at least one dimension is needed")
    refused(op, (normal(3, 4), "int8/channel2"), ShapeMismatch, "met a tensor of shape [3, 4] for spec int8/channel2")
    with pytest.raises(InvalidOption, match="minmax is for"):
        OPS.fake_quantize_weight(normal(3, 4), "int8/channel", "minmax")


@pytest.mark.parametrize("text", ["int8/channel", "int4/group32/affine/bf16"])
def test_embedding_packed_refuses_what_does_not_fit(text: str) -> None:
    indices = some_rows(200)
    packed, scale, zero_point, whole, count, width, spec, dtype = Table(text).arguments()

    def case(words: str, *given: Any, error: type[FxQuantError] = ShapeMismatch) -> None:
        refused("embedding_packed", given, error, words)

    sizes = (count, width, spec)
    case("indices of dtype torch.int16", indices.short(), packed, scale, zero_point, whole, *sizes, dtype)
    case("met packed of shape", indices, packed[1:], scale, zero_point, whole, *sizes, dtype)
    case("met packed of shape", indices, packed, scale, zero_point, whole, count + 64, width, spec, dtype)
    case("met scale of shape", indices, packed, scale[:7], zero_point, whole, *sizes, dtype)
    case("met packed on device meta", indices, packed.to("meta"), scale, zero_point, whole, *sizes, dtype)
    case("met output dtype torch.int8", indices, packed, scale, zero_point, whole, *sizes, torch.int8)
    if zero_point is not None:
        case("met no zero_point", indices, packed, scale, None, whole, *sizes, dtype)
        case(
            "per tensor, channel",
            indices,
            packed,
            scale,
            None,
            whole,
            200,
            72,
            "int4/channel1",
            dtype,
            error=InvalidSpec,
        )
