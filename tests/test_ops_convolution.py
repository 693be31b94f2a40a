"""Convolutions, embedding_dequantize, decode_rows, fake_quantize: schemas, references, fakes, gradients, errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import FxQuantError, GradientsNeedTraining, InvalidSpec, ShapeMismatch, UnsupportedActivation
from fxquant.ops import reference
from fxquant.ops.convolution_checks import memory_format

OPS = torch.ops.fxquant
SCHEMAS = {
    "int8_conv_dynamic": "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int isa=0) -> Tensor",
    "conv_weight_only": "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "Tensor? bias, int out_channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, str spec, "
    "int isa=0) -> Tensor",
    "embedding_dequantize": "(Tensor indices, Tensor rows, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    "int embedding_dim, str spec, ScalarType dtype) -> Tensor",
    "decode_rows": "(Tensor rows, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, int width, str spec, "
    "ScalarType dtype) -> Tensor",
    "fake_quantize": "(Tensor x, str spec) -> Tensor",
}
MOVES = ([2, 1], [1, 0], [1, 2])  # stride, padding, dilation
SPEC = "int4/group5/affine"


class Problem:
    """x [2, 3, 9, 8], a weight [5, 3, 3, 2] in int8 and in SPEC."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(2, 3, 9, 8, generator=generator)
        self.weight = torch.randn(5, 18, generator=generator)
        self.bias = torch.randn(5, generator=generator)
        codes, self.scale, _, _ = reference.quantize_weight(self.weight, "int8/channel")
        self.codes = codes.view(5, 3, 3, 2)
        self.int8_weight = (codes.float() * self.scale).view(5, 3, 3, 2)
        self.packed = reference.int8_pack(codes)
        coded = reference.quantize_weight(self.weight, SPEC)
        self.coded_weight = reference.dequantize(*coded[:3], SPEC, torch.float32).view(5, 3, 3, 2)
        self.panels = reference.pack_panels(coded[0], SPEC)
        self.granules = [reference.pack_granules(t, SPEC, 5, 18) for t in coded[1:3]]

    def int8(self, bias: Tensor | None = None) -> tuple[Any, ...]:
        return self.packed, self.scale, bias, [3, 2], *MOVES

    def coded(self, bias: Tensor | None = None) -> tuple[Any, ...]:
        return self.panels, *self.granules, None, bias, 5, [3, 2], *MOVES, SPEC

    def table(self) -> tuple[Any, ...]:
        codes, scale, zero_point, _ = reference.quantize_weight(self.weight, SPEC)
        return reference.pack_rows(codes, SPEC), scale, zero_point, None, 18, SPEC, torch.bfloat16


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    p = Problem()
    bias = p.bias.clone().requires_grad_()
    last = p.x.contiguous(memory_format=torch.channels_last).requires_grad_()
    return {
        "int8_conv_dynamic": (OPS.int8_conv_dynamic.default, (p.x.half(), *p.int8())),
        "int8_conv_dynamic-grad": (OPS.int8_conv_dynamic.default, (last, *p.int8(bias))),
        "conv_weight_only": (OPS.conv_weight_only.default, (p.x.bfloat16(), *p.coded())),
        "conv_weight_only-grad": (OPS.conv_weight_only.default, (last, *p.coded(bias))),
        "embedding_dequantize": (OPS.embedding_dequantize.default, (torch.tensor([[4, 0]]), *p.table())),
        "decode_rows": (OPS.decode_rows.default, p.table()),
        "fake_quantize": (OPS.fake_quantize.default, (p.x.half(), "fp4_e2m1/group16/e4m3")),
        "fake_quantize-grad": (OPS.fake_quantize.default, (last, "int8/sample")),
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


# ---- references


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dynamic_reference_is_a_convolution_of_what_the_codes_mean(dtype: torch.dtype) -> None:
    p = Problem()
    codes, scale, _ = reference.quantize_dynamic(p.x.to(dtype), "int8/sample")
    assert scale.shape == (2, 1, 1, 1)
    weight = p.codes.double() * p.scale.double().view(-1, 1, 1, 1)
    want = torch.nn.functional.conv2d(codes.double() * scale.double(), weight, p.bias.double(), *MOVES)
    got = reference.int8_conv_dynamic(p.x.to(dtype), *p.int8(p.bias))
    # Three roundings of the product, one of the sum with the bias, and that of the output.
    bound = 2.0**-24 * (4 * (want - p.bias.double().view(-1, 1, 1)).abs() + want.abs())
    bound = bound + (0.0 if dtype == torch.float32 else 2.0**-8) * want.abs()
    assert ((got.double() - want).abs() <= bound * 1.01).all()


def test_the_weight_only_reference_is_a_convolution_of_the_dequantized_weight() -> None:
    p = Problem()
    want = torch.nn.functional.conv2d(p.x, p.coded_weight, None, *MOVES) + p.bias.view(-1, 1, 1)
    assert torch.equal(reference.conv_weight_only(p.x, *p.coded(p.bias)), want)


@pytest.mark.parametrize("name", ["int8", "coded"])
def test_autocast_does_not_change_the_numbers(name: str) -> None:
    p = Problem()
    op = reference.int8_conv_dynamic if name == "int8" else reference.conv_weight_only
    want = op(p.x, *getattr(p, name)(p.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(p.x, *getattr(p, name)(p.bias)), want)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """aten's own kernel for float32 volumes, taken on one thread, ignores the memory format of x; oneDNN's does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape", [(2, 3, 9), (2, 3, 9, 8), (2, 3, 6, 9, 8), (1, 1, 4, 4), (1, 3, 1, 1), (2, 1, 5, 5), (1, 4, 6, 1)], ids=str
)
def test_memory_format_is_that_of_aten(shape: tuple[int, ...], two_threads: None) -> None:
    formats = {3: [], 4: [torch.channels_last], 5: [torch.channels_last_3d]}[len(shape)]
    weight = torch.randn(5, shape[1], *[1] * (len(shape) - 2))
    ones, zeros = [1] * (len(shape) - 2), [0] * (len(shape) - 2)
    for made in (torch.contiguous_format, *formats):
        x = torch.randn(shape).contiguous(memory_format=made)
        want = torch.ops.aten.convolution.default(x, weight, None, ones, zeros, ones, False, zeros, 1)
        assert want.stride() == torch.empty(want.shape, memory_format=memory_format(x)).stride()


# ---- gradients


@pytest.mark.parametrize("name", ["int8_conv_dynamic", "conv_weight_only"])
def test_gradients_of_convolutions_are_those_of_the_dequantized_weight(name: str) -> None:
    p = Problem()
    dynamic = name == "int8_conv_dynamic"
    x, bias = p.x.clone().requires_grad_(), p.bias.clone().requires_grad_()
    y = getattr(OPS, name)(x, *(p.int8(bias) if dynamic else p.coded(bias)))
    like_x, like_bias = p.x.clone().requires_grad_(), p.bias.clone().requires_grad_()
    weight = p.int8_weight if dynamic else p.coded_weight
    want = torch.nn.functional.conv2d(like_x, weight, like_bias, *MOVES)
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    y.backward(seed)
    want.backward(seed)
    # The same two library calls, on a weight that is equal bit for bit; only the bias is summed otherwise.
    torch.testing.assert_close(x.grad, like_x.grad, rtol=0.0, atol=0.0)
    torch.testing.assert_close(bias.grad, like_bias.grad, rtol=2.0**-18, atol=2.0**-18)


def test_the_gradient_of_fake_quantize_passes_straight_through() -> None:
    x = Problem().x.requires_grad_()
    seed = torch.randn(x.shape)
    OPS.fake_quantize(x, "float8_e4m3fn/token").backward(seed)
    assert x.grad is not None
    assert torch.equal(x.grad, seed)


def test_gradients_to_scales_are_refused() -> None:
    p = Problem()
    packed, scale, *rest = p.int8()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.int8_conv_dynamic, weight scale"):
        OPS.int8_conv_dynamic(p.x, packed, scale.requires_grad_(), *rest).sum().backward()
    packed, scale, *rest = p.coded()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.conv_weight_only, weight scale"):
        OPS.conv_weight_only(p.x, packed, scale.requires_grad_(), *rest).sum().backward()
    rows, scale, *rest = p.table()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.embedding_dequantize"):
        OPS.embedding_dequantize(torch.arange(3), rows, scale.requires_grad_(), *rest).sum().backward()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.decode_rows"):
        OPS.decode_rows(rows, scale, *rest).sum().backward()


# ---- errors: the same from reference and fake


def refused(name: str, args: tuple[Any, ...], error: type[FxQuantError], words: str) -> None:
    with pytest.raises(error) as caught:
        getattr(reference, name)(*args)
    assert words in str(caught.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error) as caught:
        getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["int8_conv_dynamic", "conv_weight_only"])
def test_convolutions_refuse_what_does_not_fit(name: str) -> None:
    p = Problem()
    arguments = p.int8() if name == "int8_conv_dynamic" else p.coded()
    at = next(i for i, a in enumerate(arguments) if a == [3, 2])

    def case(words: str, x: Tensor = p.x, error: type[FxQuantError] = ShapeMismatch, **change: Any) -> None:
        given = list(arguments)
        for key, value in change.items():
            given[{"packed": 0, "bias": at - (2 if name == "conv_weight_only" else 1)}.get(key, at)] = value
            if key in ("stride", "padding", "dilation"):
                given[at] = [3, 2]
                given[at + 1 + ["stride", "padding", "dilation"].index(key)] = value
        refused(name, (x, *given), error, words)

    case("the activation has dtype torch.int64", torch.ones(2, 3, 9, 8, dtype=torch.int64), UnsupportedActivation)
    case("met packed of", packed=p.x)
    case("met bias of shape [4]", bias=torch.ones(4))
    case("kernel, stride and dilation of at least 1", stride=[0, 1])
    case("padding of at least 0", padding=[0, -1])
    case("as many of the others, is needed", dilation=[1])
    case("room for a kernel that reaches 17", dilation=[8, 1])
    case("is needed", torch.ones(2, 4, 9, 8))
    case("met packed on device meta, but cpu", packed=arguments[0].to("meta"))


def test_what_reads_rows_refuses_what_does_not_fit() -> None:
    rows, scale, zero_point, whole, width, spec, dtype = Problem().table()
    index = torch.arange(3)

    def case(words: str, *given: Any) -> None:
        refused("embedding_dequantize", given, ShapeMismatch, words)
        if given[0] is index:
            refused("decode_rows", given[1:], ShapeMismatch, words)

    case("indices of dtype torch.int16", index.short(), rows, scale, zero_point, whole, width, spec, dtype)
    case("but uint8 [N, 10] for 19 codes", index, rows, scale, zero_point, whole, 19, spec, dtype)
    case("met scale of shape [4, 4]", index, rows, scale[:4], zero_point, whole, width, spec, dtype)
    case("met no zero_point", index, rows, scale, None, whole, width, spec, dtype)
    case("output dtype torch.int8", index, rows, scale, zero_point, whole, width, spec, torch.int8)
    e4m3 = scale.to(torch.float8_e4m3fn)
    case("met no tensor_scale", index, rows, e4m3, None, None, width, "fp4_e2m1/group5/e4m3", dtype)


@pytest.mark.parametrize("index", [5, -1])
def test_an_index_outside_of_the_table_is_an_index_error(index: int) -> None:
    for op in (reference.embedding_dequantize, OPS.embedding_dequantize):
        with pytest.raises(IndexError, match="out of range"):
            op(torch.tensor([index]), *Problem().table())


def test_fake_quantize_refuses_what_does_not_fit() -> None:
    x = Problem().x
    refused("fake_quantize", (x.double(), "int8/token"), UnsupportedActivation, "has dtype torch.float64")
    refused("fake_quantize", (x, "int4/token"), InvalidSpec, "takes int8 or a float format, symmetric")
    refused("fake_quantize", (x, "int8/channel"), InvalidSpec, "per tensor, token, sample or group")
