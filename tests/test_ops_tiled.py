"""The ops over tiled weights of any format: schemas, references, fakes, gradients and errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.errors import FxQuantError, GradientsNeedTraining, InvalidSpec, ShapeMismatch, UnsupportedActivation
from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.ops import reference
from fxquant.spec import TensorSpec

OPS = torch.ops.fxquant
REFERENCE: Any = reference  # operands are put together as tuples of any length
TAIL = (
    "Tensor? bias, Tensor? residual, str activation, int in_features, str spec, ScalarType dtype, int[] plan) -> Tensor"
)
SCHEMAS = {
    "tile_codes": "(Tensor codes, str spec) -> Tensor tiles",
    "untile_codes": "(Tensor tiles, int in_features, str spec) -> Tensor codes",
    "transpose_granules": "(Tensor t, str spec, int out_features, int in_features) -> Tensor transposed",
    "decode_tiles": "(Tensor tiles, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, int in_features, str spec, "
    "ScalarType dtype) -> Tensor",
    "tiled_linear": f"(Tensor x, Tensor tiles, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, {TAIL}",
    "tiled_linear_codes": "(Tensor codes, Tensor x_scale, Tensor? x_tensor_scale, str x_spec, Tensor tiles, "
    f"Tensor scale, Tensor? zero_point, Tensor? tensor_scale, {TAIL}",
    "norm_quantize": "(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, str spec) -> "
    "(Tensor codes, Tensor scale, Tensor tensor_scale)",
}
SPECS = ("int4/group32/affine/bf16", "int3/channel", "int2/group5/shift", "fp6_e3m2/block128x16", "int8/tensor")
# x, weight
PAIRS = (
    ("int8/token", "int8/channel"),
    ("int8/tensor", "int8/tensor"),
    ("int8/token", "int4/group32/bf16"),
    ("int8/token", "int4/group32/stepped"),
    ("int8/token", "int4/group32/affine/bf16"),
    ("int8/group16", "int8/block32x32"),
    ("float8_e4m3fn/tensor", "float8_e4m3fn/tensor"),
    ("float8_e4m3fn/token", "float8_e5m2/channel"),
    ("float8_e4m3fn/group32", "float8_e4m3fn/block32x32"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
    ("mxfp8", "mxfp6"),
    ("fp4_e2m1/token", "fp6_e2m3/channel"),
    ("float8_e4m3fn/token", "int4/group32"),
)
N, K = 65, 70


class Case:
    """A weight [65, 70] and an activation [2, 3, 70], quantized and laid out."""

    def __init__(self, text: str, x_text: str = "") -> None:
        self.spec, self.text = TensorSpec.parse(text), str(TensorSpec.parse(text))
        self.x_spec = TensorSpec.parse(x_text) if x_text else None
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(N, K, generator=generator)
        self.x = torch.randn(2, 3, K, generator=generator)
        self.bias = torch.randn(N, generator=generator)
        self.residual = torch.randn(2, 3, N, generator=generator)
        self.codes, self.scale, self.zero_point, tensor_scale = quantize(weight, self.spec)
        self.tensor_scale = tensor_scale if self.spec.has_tensor_scale else None
        self.tiles = REFERENCE.tile_codes(self.codes, self.text)
        self.tiled_scale = self.granules(self.scale)
        self.tiled_zero = self.granules(self.zero_point) if self.spec.has_zero_point else None
        if scaled_by_blocks(self.spec, self.x_spec):
            self.tiles, self.tiled_scale = REFERENCE.pack_rows(self.codes, self.text), self.scale

    def granules(self, t: Tensor) -> Tensor:
        return REFERENCE.transpose_granules(t, self.text, N, K)

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.tiles, self.tiled_scale, self.tiled_zero, self.tensor_scale

    @property
    def value(self) -> Tensor:
        zero = self.zero_point if self.spec.has_zero_point else None
        return REFERENCE.dequantize(self.codes, self.scale, zero, self.text, torch.float32, self.tensor_scale)

    def linear(self, x: Tensor, bias: Any = None, residual: Any = None, activation: str = "") -> tuple[Any, ...]:
        return (x, *self.parts, bias, residual, activation, K, self.text, x.dtype, [])

    def of_codes(self, bias: Any = None, residual: Any = None, activation: str = "", packed: bool = True) -> Any:
        assert self.x_spec is not None
        codes, scale, whole = REFERENCE.quantize_dynamic(self.x, str(self.x_spec))
        if self.x_spec.format.bits == 4 and packed:
            codes = REFERENCE.pack_rows(codes, str(self.x_spec))
        x = (codes, scale, whole if self.x_spec.has_tensor_scale else None, str(self.x_spec))
        return (*x, *self.parts, bias, residual, activation, K, self.text, torch.float32, [])


def samples(text: str) -> dict[str, tuple[Any, ...]]:
    c = Case(text)
    return {
        "tile_codes": (c.codes, c.text),
        "untile_codes": (c.tiles, K, c.text),
        "transpose_granules": (c.scale, c.text, N, K),
        "decode_tiles": (*c.parts, K, c.text, torch.float16),
        "tiled_linear": c.linear(
            c.x.clone().requires_grad_(), c.bias.clone().requires_grad_(), c.residual.clone().requires_grad_(), "silu"
        ),
    }


@pytest.mark.parametrize("text", SPECS)
def test_opcheck(text: str) -> None:
    for name, args in samples(text).items():
        torch.library.opcheck(getattr(OPS, name).default, args)


def test_opcheck_of_codes_and_norms() -> None:
    c = Case("int4/group32/affine/bf16", "int8/token")
    torch.library.opcheck(OPS.tiled_linear_codes.default, c.of_codes(c.bias, c.residual, "gelu"))
    torch.library.opcheck(
        OPS.norm_quantize.default, (c.x, "layernorm", torch.rand(K), torch.rand(K), 1e-5, "int8/token")
    )


@pytest.mark.parametrize("text", [*SPECS, "float8_e5m2/channel", "nvfp4", "mxfp6"])
def test_fake_has_shape_dtype_and_strides_of_the_reference(text: str) -> None:
    for name, args in samples(text).items():
        check_fake(name, args)


@pytest.mark.parametrize(("x_text", "text"), PAIRS)
def test_fake_of_codes_has_shape_dtype_and_strides_of_the_reference(x_text: str, text: str) -> None:
    check_fake("tiled_linear_codes", Case(text, x_text).of_codes())


def check_fake(name: str, args: tuple[Any, ...]) -> None:
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
def test_untiling_and_decoding_give_the_quantized_weight(text: str) -> None:
    c = Case(text)
    back = OPS.untile_codes(c.tiles, K, c.text)
    assert torch.equal(back.view(torch.uint8), c.codes.view(torch.uint8))
    assert torch.equal(REFERENCE.decode_tiles(*c.parts, K, c.text, torch.float32), c.value)


@pytest.mark.parametrize("text", ["int8/tensor", "nvfp4"])
def test_joined_tensors_keep_a_number_for_each_row(text: str) -> None:
    c = Case(text)
    per_row = torch.arange(1.0, N + 1.0).view(N, 1)
    if c.spec.has_tensor_scale:
        c.tensor_scale = per_row
    else:
        c.scale, c.tiled_scale = per_row, c.granules(per_row)
    assert torch.equal(REFERENCE.decode_tiles(*c.parts, K, c.text, torch.float32), c.value)
    want = c.x.double() @ c.value.double().t()
    bound = (K + 2) * 2.0**-24 * (c.x.double().abs() @ c.value.double().abs().t())
    assert ((REFERENCE.tiled_linear(*c.linear(c.x)).double() - want).abs() <= bound).all()


ACTIVATIONS = {
    "": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bias_activation_and_residual_are_rounded_once(activation: str, dtype: torch.dtype) -> None:
    c = Case("int4/group32/affine/bf16")
    x, bias, residual = c.x.to(dtype), c.bias.to(dtype), c.residual.to(dtype)
    z = x.double() @ c.value.double().t() + bias.double()
    want = ACTIVATIONS[activation](z) + residual.double()
    got = REFERENCE.tiled_linear(*c.linear(x, bias, residual, activation))
    assert got.dtype == dtype
    error = (got.double() - want).abs()
    # K products and three more roundings of float32 in values of at most 40; then one of the result.
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert (error <= (K + 3) * 2.0**-24 * 40 + unit * want.abs()).all()


@pytest.mark.parametrize(("x_text", "text"), PAIRS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_codes_times_codes_is_the_product_of_what_they_stand_for(x_text: str, text: str, packed: bool) -> None:
    c = Case(text, x_text)
    x = REFERENCE.fake_quantize(c.x, x_text).double()
    want = x @ c.value.double().t() + c.bias.double()
    bound = (K + 8) * 2.0**-24 * (x.abs() @ c.value.double().abs().t() + c.bias.double().abs())
    got = REFERENCE.tiled_linear_codes(*c.of_codes(c.bias, packed=packed))
    assert ((got.double() - want).abs() <= bound).all()


def test_integer_sums_are_those_of_the_ops_of_the_cpu() -> None:
    c = Case("int8/channel", "int8/token")
    packed = REFERENCE.int8_pack(c.codes)
    codes, scale, *_ = c.of_codes()
    want = REFERENCE.int8_linear(codes, scale, packed, c.scale, c.bias, K, torch.float32)
    assert torch.equal(REFERENCE.tiled_linear_codes(*c.of_codes(c.bias)), want)
    c = Case("int4/group32/affine/bf16", "int8/token")
    parts = [REFERENCE.pack_granules(t, c.text, N, K) for t in (c.scale, c.zero_point)]
    packed = REFERENCE.pack_panels(c.codes, c.text)
    want = REFERENCE.linear_dynamic(c.x, packed, *parts, c.bias, N, K, c.text, torch.float32)
    assert torch.equal(REFERENCE.tiled_linear_codes(*c.of_codes(c.bias)), want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_decoded_weight(activation: str) -> None:
    c = Case("int4/group32/affine/bf16")
    ours = [t.clone().requires_grad_() for t in (c.x, c.bias, c.residual)]
    twins = [t.clone().requires_grad_() for t in (c.x, c.bias, c.residual)]
    OPS.tiled_linear(*c.linear(*ours, activation=activation)).square().sum().backward()
    (ACTIVATIONS[activation](F.linear(twins[0], c.value, twins[1])) + twins[2]).square().sum().backward()
    for one, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(one.grad, twin.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_to_a_product_of_codes_has_a_gradient(dtype: torch.dtype) -> None:
    c = Case("int8/channel", "int8/token")
    bias, residual = c.bias.clone().requires_grad_(), c.residual.to(dtype).requires_grad_()
    args = list(c.of_codes(bias=bias, residual=residual))
    args[13] = dtype
    y = OPS.tiled_linear_codes(*args)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, grad.float().reshape(-1, grad.shape[-1]).sum(0))
    assert residual.grad is not None
    assert torch.equal(residual.grad, grad)
    args[10] = "silu"
    with pytest.raises(GradientsNeedTraining, match="tiled_linear_codes"):
        OPS.tiled_linear_codes(*args).sum().backward()


def test_gradients_to_what_is_constant_are_refused_by_name() -> None:
    c = Case("nvfp4")
    assert c.tensor_scale is not None
    c.tensor_scale.requires_grad_()
    with pytest.raises(GradientsNeedTraining, match="tiled_linear"):
        OPS.tiled_linear(*c.linear(c.x)).sum().backward()
    c = Case("int8/channel", "int8/token")
    args = c.of_codes()
    args[1].requires_grad_()
    with pytest.raises(GradientsNeedTraining, match="tiled_linear_codes"):
        OPS.tiled_linear_codes(*args).sum().backward()


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["int8/token", "float8_e4m3fn/tensor", "nvfp4"])
def test_a_norm_before_codes_is_torchs_norm(norm: str, dtype: torch.dtype, spec: str) -> None:
    x, weight = Case("int8/channel").x.to(dtype), torch.rand(K).to(dtype)
    bias = torch.rand(K).to(dtype) if norm == "layernorm" else None
    normed = F.rms_norm(x, [K], weight, 1e-6) if bias is None else F.layer_norm(x, [K], weight, bias, 1e-6)
    want = REFERENCE.quantize_dynamic(normed, spec)
    got = REFERENCE.norm_quantize(x, norm, weight, bias, 1e-6, spec)
    values = [OPS.dequantize(c, s, None, spec, torch.float32, t) for c, s, t in (got, want)]
    # A value of the norm may be rounded the other way, and so may a code.
    step = {"int8/token": 2.0**-6, "float8_e4m3fn/tensor": 2.0**-3, "nvfp4": 0.5}[spec]
    assert ((values[0] - values[1]).abs() <= step * values[1].abs().amax(-1, keepdim=True)).all()
    assert (got[0].view(torch.uint8) != want[0].view(torch.uint8)).float().mean() < 0.01


def refused(name: str, args: tuple[Any, ...], error: type[FxQuantError], words: str) -> None:
    with pytest.raises(error) as caught:
        getattr(reference, name)(*args)
    assert words in str(caught.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error) as caught:
        getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert words in str(caught.value)


def replaced(args: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*args[:at], value, *args[at + 1 :])


def test_layouts_refuse_what_does_not_fit() -> None:
    c = Case("int4/group32/affine/bf16")
    refused(
        "tile_codes", (c.codes.float(), c.text), ShapeMismatch, "dtype torch.float32, but torch.uint8 of shape [N, K]"
    )
    refused("tile_codes", (c.codes, "int4/channel1/affine"), InvalidSpec, "per tensor, channel, group or block")
    refused("untile_codes", (c.tiles, 129, c.text), ShapeMismatch, "but uint8 [N, 128], made by tile_codes")
    refused("transpose_granules", (c.scale.t(), c.text, N, K), ShapeMismatch, "but shape [65, 3] for spec")


def test_the_linear_refuses_what_does_not_fit() -> None:
    c = Case("int4/group32/affine/bf16")
    args = c.linear(c.x, c.bias, c.residual)
    for at, value, words in (
        (0, c.x[..., :69], "met an activation of shape [2, 3, 69], but last dimension 70 is needed"),
        (1, c.tiles[:, 1:], "met tiles of shape [65, 63] and dtype torch.uint8, but uint8 [N, 64]"),
        (2, c.scale, "met scale of shape [65, 3] and dtype torch.bfloat16, but torch.bfloat16 of shape [3, 65]"),
        (3, None, "met no zero_point"),
        (5, c.bias[1:], "met bias of shape [64]"),
        (6, c.residual.half(), "met residual of shape [2, 3, 65] and dtype torch.float16, but torch.float32 of shape"),
        (6, c.residual[0], "met residual of shape [3, 65]"),
        (8, 2**25, "in_features 33554432"),
        (10, torch.float64, "output dtype torch.float64"),
    ):
        refused("tiled_linear", replaced(args, at, value), ShapeMismatch, words)
    refused("tiled_linear", replaced(args, 0, c.x.double()), UnsupportedActivation, "float64")
    refused("tiled_linear", replaced(args, 7, "tanh"), InvalidSpec, "takes the activations '', 'relu'")
    with pytest.raises(ShapeMismatch, match="on device"):
        REFERENCE.tiled_linear(*replaced(args, 1, c.tiles.to("meta")))


def test_the_linear_of_codes_refuses_what_does_not_fit() -> None:
    c = Case("mxfp4", "mxfp4")
    args = c.of_codes()
    for at, value, words in (
        (
            0,
            args[0][..., 1:],
            "met codes of shape [2, 3, 34] and dtype torch.uint8, but torch.uint8 of shape [..., 70] or",
        ),
        (1, args[1][..., 1:], "met x_scale of shape [2, 3, 2]"),
        (4, Case("mxfp4").tiles, "but uint8 [N, 35], rows as pack_rows makes them"),
    ):
        refused("tiled_linear_codes", replaced(args, at, value), ShapeMismatch, words)
    args = Case("int8/channel", "int8/token").of_codes()
    refused("tiled_linear_codes", replaced(args, 3, "int8/sample"), InvalidSpec, "per tensor, token or group")
    c = Case("int4/group32/shift")
    x = REFERENCE.quantize_dynamic(c.x, "int8/token")[:2]
    refused("tiled_linear_codes", (*x, None, "int8/token", *c.linear(c.x)[1:]), InvalidSpec, "symmetric or affine")
    refused("norm_quantize", (c.x, "groupnorm", None, None, 0.0, "int8/token"), InvalidSpec, "'rmsnorm', 'layernorm'")
    refused("norm_quantize", (c.x, "rmsnorm", c.bias, None, 0.0, "int8/token"), ShapeMismatch, "weight of shape [65]")


def test_no_rows() -> None:
    c = Case("int4/group32/bf16", "int8/token")
    assert REFERENCE.tiled_linear(*c.linear(c.x[:0], c.bias)).shape == (0, 3, N)
    c.x = c.x[:0]
    assert REFERENCE.tiled_linear_codes(*c.of_codes(c.bias)).shape == (0, 3, N)
