"""The ops over packed weights of any format: schemas, references, fakes, gradients and errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.errors import FxQuantError, GradientsNeedTraining, InvalidSpec, ShapeMismatch, UnsupportedActivation
from fxquant.ops import reference
from fxquant.ops.coded_linear import x_group_of
from fxquant.spec import TensorSpec
from tests.schemas import AROUND

OPS = torch.ops.fxquant
SCHEMAS = {
    "pack_panels": "(Tensor codes, str spec) -> Tensor packed",
    "unpack_panels": "(Tensor packed, int out_features, int in_features, str spec) -> Tensor codes",
    "pack_granules": "(Tensor t, str spec, int out_features, int in_features) -> Tensor packed",
    "decode_weight": "(Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, int out_features, "
    "int in_features, str spec, ScalarType dtype) -> Tensor",
    "linear_weight_only": "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, "
    f"Tensor? bias, int out_features, int in_features, str spec, ScalarType dtype, int isa=0, {AROUND}) -> Tensor",
    "linear_dynamic": "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int out_features, "
    f"int in_features, str spec, ScalarType dtype, int isa=0, {AROUND}, int x_group=0) -> Tensor",
}
SPECS = ("int4/group32/affine/bf16", "int3/channel", "int2/group5/shift", "fp6_e3m2/block128x16", "int8/tensor")


class Weight:
    """A weight [65, 70], quantized and packed."""

    def __init__(self, text: str) -> None:
        self.spec = TensorSpec.parse(text)
        self.text = str(self.spec)
        generator = torch.Generator().manual_seed(1)
        self.float = torch.randn(65, 70, generator=generator)
        self.x = torch.randn(5, 70, generator=generator)
        self.bias = torch.randn(65, generator=generator)
        self.codes, self.scale, self.zero_point, tensor_scale = quantize(self.float, self.spec)
        self.packed = reference.pack_panels(self.codes, self.text)
        self.packed_scale = self.granules(self.scale)
        self.packed_zero = self.granules(self.zero_point) if self.spec.has_zero_point else None
        self.tensor_scale = tensor_scale if self.spec.has_tensor_scale else None

    def granules(self, t: Tensor) -> Tensor:
        return reference.pack_granules(t, self.text, 65, 70)

    def decode(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        return (*self.parts, self.tensor_scale, 65, 70, self.text, dtype)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed, self.packed_scale, self.packed_zero

    def weight_only(self, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        return (x, *self.parts, self.tensor_scale, bias, 65, 70, self.text, x.dtype)

    def dynamic(self, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        return (x, *self.parts, bias, 65, 70, self.text, x.dtype)


def samples(text: str) -> dict[str, tuple[Any, ...]]:
    w = Weight(text)
    found = {
        "pack_panels": (w.codes, w.text),
        "unpack_panels": (w.packed, 65, 70, w.text),
        "pack_granules": (w.scale, w.text, 65, 70),
        "decode_weight": w.decode(torch.float16),
        "linear_weight_only": w.weight_only(w.x.clone().requires_grad_(), w.bias.clone().requires_grad_()),
    }
    if text == "int4/group32/affine/bf16":
        found["linear_dynamic"] = w.dynamic(w.x.clone().requires_grad_(), w.bias.clone().requires_grad_())
    return found


@pytest.mark.parametrize("text", SPECS)
def test_opcheck(text: str) -> None:
    for name, args in samples(text).items():
        torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("text", [*SPECS, "float8_e5m2/channel", "nvfp4", "mxfp6"])
def test_fake_has_shape_dtype_and_strides_of_the_reference(text: str) -> None:
    for name, args in samples(text).items():
        with torch.no_grad():
            real = getattr(reference, name)(*args)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride()), name


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_the_agreed_ones(name: str) -> None:
    op = getattr(OPS, name).default
    assert str(op._schema) == f"fxquant::{name}{SCHEMAS[name]}"
    assert list(inspect.signature(getattr(reference, name)).parameters) == [a.name for a in op._schema.arguments]
    assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(op.tags)


@pytest.mark.parametrize("text", [*SPECS, "float8_e5m2/channel", "nvfp4", "mxfp6"])
def test_unpacking_and_decoding_give_the_quantized_weight(text: str) -> None:
    w = Weight(text)
    back = OPS.unpack_panels(w.packed, 65, 70, w.text)
    assert torch.equal(back.view(torch.uint8), w.codes.view(torch.uint8))
    want = reference.dequantize(w.codes, w.scale, w.zero_point, w.text, torch.float32, w.tensor_scale)
    assert torch.equal(reference.decode_weight(*w.decode()), want)


@pytest.mark.parametrize("text", ["int8/tensor", "nvfp4"])
def test_joined_tensors_keep_a_number_for_each_row(text: str) -> None:
    w = Weight(text)
    per_row = torch.arange(1.0, 66.0).view(65, 1)
    if w.spec.has_tensor_scale:
        w.tensor_scale = per_row
    else:
        w.scale = per_row
        w.packed_scale = w.granules(per_row)
    want = reference.dequantize(w.codes, w.scale, None, w.text, torch.float32, w.tensor_scale)
    assert torch.equal(reference.decode_weight(*w.decode()), want)


@pytest.mark.parametrize("name", ["linear_weight_only", "linear_dynamic"])
def test_gradients_are_those_of_the_decoded_weight(name: str) -> None:
    args = samples("int4/group32/affine/bf16")[name]
    x, bias = args[0], args[5 if name == "linear_weight_only" else 4]
    getattr(OPS, name)(*args).square().sum().backward()
    y = getattr(reference, name)(*args).detach()
    value = reference.decode_weight(*Weight("int4/group32/affine/bf16").decode())
    torch.testing.assert_close(x.grad, 2 * y @ value, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad, 2 * y.sum(0), rtol=1e-5, atol=1e-4)


def test_a_gradient_to_the_scale_is_refused_by_name() -> None:
    w = Weight("int3/channel")
    w.packed_scale.requires_grad_()
    with pytest.raises(GradientsNeedTraining, match="linear_weight_only"):
        OPS.linear_weight_only(*w.weight_only(w.x)).sum().backward()
    with pytest.raises(GradientsNeedTraining, match="decode_weight"):
        OPS.decode_weight(*w.decode()).sum().backward()


def test_gradients_to_a_shift_and_to_a_tensor_scale_are_refused_by_name() -> None:
    """They were None, without a word."""
    w = Weight("int4/group32/shift")
    assert w.packed_zero is not None
    w.packed_zero.requires_grad_()
    with pytest.raises(GradientsNeedTraining, match="linear_weight_only"):
        OPS.linear_weight_only(*w.weight_only(w.x)).sum().backward()
    w = Weight("nvfp4")
    assert w.tensor_scale is not None
    w.tensor_scale.requires_grad_()
    with pytest.raises(GradientsNeedTraining, match="linear_weight_only"):
        OPS.linear_weight_only(*w.weight_only(w.x)).sum().backward()


def test_autocast_does_not_change_the_numbers() -> None:
    w = Weight("int4/group32/affine/bf16")
    for op, args in ((reference.linear_weight_only, w.weight_only(w.x)), (reference.linear_dynamic, w.dynamic(w.x))):
        want = op(*args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(op(*args), want)


def refused(name: str, args: tuple[Any, ...], error: type[FxQuantError], words: str) -> None:
    with pytest.raises(error) as caught:
        getattr(reference, name)(*args)
    assert words in str(caught.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error) as caught:
        getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert words in str(caught.value)


def replaced(args: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*args[:at], value, *args[at + 1 :])


def test_packing_refuses_what_does_not_fit() -> None:
    w = Weight("int4/group32/affine/bf16")
    words = "met codes of 2 dimensions and dtype torch.float32, but torch.uint8 of shape [N, K]"
    refused("pack_panels", (w.codes.float(), w.text), ShapeMismatch, words)
    refused("pack_panels", (w.codes[0], w.text), ShapeMismatch, "met codes of 1 dimensions")
    refused("pack_panels", (w.codes, "int4/channel1/affine"), InvalidSpec, "per tensor, channel, group or block")
    refused("unpack_panels", (w.packed, 64, 70, w.text), ShapeMismatch, "but uint8 [2240] for a weight [64, 70]")
    refused("pack_granules", (w.scale.t(), w.text, 65, 70), ShapeMismatch, "but shape [65, 3] for spec")


@pytest.mark.parametrize("name", ["linear_weight_only", "linear_dynamic"])
def test_linears_refuse_what_does_not_fit(name: str) -> None:
    w = Weight("int4/group32/affine/bf16")
    args = w.weight_only(w.x, w.bias) if name == "linear_weight_only" else w.dynamic(w.x, w.bias)
    bias, spec, dtype = (5, 8, 9) if name == "linear_weight_only" else (4, 7, 8)
    for at, value, words in (
        (0, w.x[:, :69], "met an activation of shape [5, 69], but last dimension 70 is needed"),
        (1, w.packed.to("meta"), "on device"),
        (1, w.packed[1:], "met packed of shape [2274] and dtype torch.uint8, but uint8 [2275]"),
        (2, w.scale, "met scale of shape [65, 3] and dtype torch.bfloat16, but torch.bfloat16 of shape [195]"),
        (2, w.packed_scale.float(), "dtype torch.float32, but torch.bfloat16 of shape [195]"),
        (3, None, "met no zero_point, but torch.uint8 of shape [195]"),
        (bias, w.bias[:64], "met bias of shape [64] and dtype torch.float32, but a float bias of shape [65]"),
        (dtype, torch.float64, "met output dtype torch.float64, but float32, bfloat16 or float16"),
    ):
        refused(name, replaced(args, at, value), ShapeMismatch, words)
    refused(name, replaced(args, 0, w.x.double()), UnsupportedActivation, "torch.float64")
    refused(name, replaced(args, spec, "int4/sample"), InvalidSpec, "per tensor, channel, group or block")


@pytest.mark.parametrize("text", ["int8/channel", "int4/group32"])
def test_a_weight_without_input_features_is_refused(text: str) -> None:
    """The kernel refused it; the reference did so for groups alone, by an error of torch's."""
    codes, scale, _, _ = quantize(torch.ones(3, 0), TensorSpec.parse(text))
    packed, granules = reference.pack_panels(codes, text), reference.pack_granules(scale, text, 3, 0)
    args = (packed, granules, None, None, 3, 0, text, torch.float32)
    refused("decode_weight", args, ShapeMismatch, "met in_features 0, but 1 to")


def test_a_missing_tensor_scale_is_named() -> None:
    w = Weight("nvfp4")
    w.tensor_scale = None
    refused("decode_weight", w.decode(), ShapeMismatch, "met no tensor_scale, but float32 [1, 1] or [N, 1]")


@pytest.mark.parametrize("text", ["fp4_e2m1/channel", "int4/group6", "int4/channel/shift"])
def test_linear_dynamic_takes_integers_in_whole_quads(text: str) -> None:
    w = Weight(text)
    refused("linear_dynamic", w.dynamic(w.x), InvalidSpec, "linear_dynamic takes integers, symmetric or affine")


@pytest.mark.parametrize("x_group", [-4, 6])
def test_linear_dynamic_takes_groups_of_x_in_whole_quads(x_group: int) -> None:
    w = Weight("int8/channel")
    around = (0, None, "", "", None, None, 0.0, x_group)  # from isa on
    words = "linear_dynamic takes 0, for a scale per token, or a multiple of 4"
    refused("linear_dynamic", (*w.dynamic(w.x), *around), InvalidSpec, words)


@pytest.mark.parametrize(
    ("spec", "x_group"),
    [
        ("int8/token", 0),
        ("int8/group32", 32),
        ("int8/group6", None),
        ("int8/group32/e8m0", None),
        ("int8/tensor", None),
        ("float8_e4m3fn/group32", None),
    ],
)
def test_how_linear_dynamic_quantizes_x(spec: str, x_group: int | None) -> None:
    assert x_group_of(spec) == x_group


def test_gradients_with_x_in_groups_are_those_of_the_decoded_weight() -> None:
    w = Weight("int8/group32")
    x = w.x.clone().requires_grad_()
    OPS.linear_dynamic(*w.dynamic(x), x_group=8).square().sum().backward()
    y = reference.linear_dynamic(*w.dynamic(w.x), x_group=8)
    torch.testing.assert_close(x.grad, 2 * y @ reference.decode_weight(*w.decode()), rtol=1e-5, atol=1e-4)
