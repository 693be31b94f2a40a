"""fake_quantize_static, int8_linear_static, int8_conv_static: schemas, references, fakes, gradients, errors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.errors import FxQuantError, GradientsNeedTraining, InvalidSpec, ShapeMismatch, UnsupportedActivation
from fxquant.numerics import code_values
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.schemas import AROUND
from tests.twins import U, assert_same_bits, assert_within, int8_linear_float64

OPS = torch.ops.fxquant
SCHEMAS = {
    "fake_quantize_static": "(Tensor x, Tensor scale, str spec) -> Tensor",
    "int8_linear_static": "(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, int in_features, "
    f"int isa=0, {AROUND}) -> Tensor",
    "int8_conv_static": "(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int isa=0) -> Tensor",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "fp6_e3m2", "fp4_e2m1")
MOVES = ([2, 1], [1, 0], [1, 2])  # stride, padding, dilation
SCALE = 0.02  # values of a normal distribution: one in eighty is cut off at 127 * 0.02


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Linear:
    """x [5, 70], a weight [65, 70] in int8."""

    def __init__(self) -> None:
        self.x, self.x_scale = normal(5, 70), torch.tensor(SCALE)
        self.codes, self.scale, _, _ = reference.quantize_weight(normal(65, 70, seed=2), "int8/channel")
        self.packed, self.bias = reference.int8_pack(self.codes), normal(65, seed=3)
        self.weight = self.codes.float() * self.scale

    def arguments(self, bias: Tensor | None = None) -> tuple[Any, ...]:
        return self.x_scale, self.packed, self.scale, bias, 70


class Convolution:
    """x [2, 3, 9, 8], a weight [5, 3, 3, 2] in int8."""

    def __init__(self) -> None:
        self.x, self.x_scale = normal(2, 3, 9, 8), torch.tensor([SCALE])
        self.codes, self.scale, _, _ = reference.quantize_weight(normal(5, 18, seed=2), "int8/channel")
        self.packed, self.bias = reference.int8_pack(self.codes), normal(5, seed=3)
        self.weight = (self.codes.float() * self.scale).view(5, 3, 3, 2)

    def arguments(self, bias: Tensor | None = None) -> tuple[Any, ...]:
        return self.x_scale, self.packed, self.scale, bias, [3, 2], *MOVES


def codes_of(x: Tensor, scale: float) -> Tensor:
    """The definition, in numpy's float32 scalars: int8 codes of finite x."""
    factor = np.float32(1.0) / np.float32(scale)
    raw = np.rint(x.float().numpy() * factor)
    return torch.from_numpy(np.clip(raw, -127, 127).astype(np.int8))


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    linear, conv = Linear(), Convolution()
    bias = [b.bias.clone().requires_grad_() for b in (linear, conv)]
    deep = linear.x.view(5, 1, 70).clone().requires_grad_()
    last = conv.x.contiguous(memory_format=torch.channels_last).requires_grad_()
    round_, one = OPS.fake_quantize_static.default, torch.tensor([SCALE])
    return {
        "fake_quantize_static": (round_, (conv.x.half(), one, "float8_e4m3fn/tensor")),
        "fake_quantize_static-grad": (round_, (last, one.view(()), "int8/tensor")),
        "fake_quantize_static-empty": (round_, (conv.x[:0], one, "fp6_e3m2/tensor")),
        "int8_linear_static": (OPS.int8_linear_static.default, (linear.x.bfloat16(), *linear.arguments())),
        "int8_linear_static-grad": (OPS.int8_linear_static.default, (deep, *linear.arguments(bias[0]))),
        "int8_linear_static-bias": (OPS.int8_linear_static.default, (linear.x, *linear.arguments(bias[0]))),
        "int8_linear_static-empty": (OPS.int8_linear_static.default, (linear.x[:0], *linear.arguments())),
        "int8_conv_static": (OPS.int8_conv_static.default, (conv.x.half(), *conv.arguments())),
        "int8_conv_static-grad": (OPS.int8_conv_static.default, (last, *conv.arguments(bias[1]))),
        "int8_conv_static-empty": (OPS.int8_conv_static.default, (conv.x[:0], *conv.arguments())),
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


# ---- numbers of the references


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_rounded_as_defined(dtype: torch.dtype) -> None:
    x = torch.cat([normal(40, 70), torch.arange(-300, 300).view(-1, 60) * SCALE / 2 @ torch.ones(60, 70) / 60])
    x = x.to(dtype)
    want = (codes_of(x, SCALE).float() * torch.tensor(SCALE)).to(dtype)
    assert_same_bits(reference.fake_quantize_static(x, torch.tensor(SCALE), "int8/tensor"), want)
    assert int((codes_of(x, SCALE).abs() == 127).sum()) > 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", FLOATS)
def test_floats_are_rounded_to_the_nearest_of_the_grid(number: str, dtype: torch.dtype) -> None:
    x, spec = normal(20, 70).to(dtype), TensorSpec.parse(f"{number}/tensor")
    scale = 1.5 / spec.qmax  # what is beyond 1.5 is cut off
    table = code_values(spec.format).double()
    table = table[table.isfinite()].unique()
    got = reference.fake_quantize_static(x, torch.tensor(scale), str(spec)).double()
    wanted = (x.double() / scale).clamp(-spec.qmax, spec.qmax)
    nearest = (wanted[..., None] - table).abs().amin(-1) * scale
    # Three roundings: of the factor, of x * factor, of the value times the scale; then to the output.
    bound = nearest + (3 * U + HALF_UNIT[dtype]) * 1.01 * torch.maximum(got.abs(), (wanted * scale).abs())
    assert_within(got, wanted * scale, bound + (2.0**-25 if dtype == torch.float16 else 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_linear_is_within_the_derived_bound(with_bias: bool, dtype: torch.dtype) -> None:
    p = Linear()
    x, bias = p.x.to(dtype), p.bias if with_bias else None
    got = reference.int8_linear_static(x, *p.arguments(bias))
    assert (got.dtype, got.shape) == (dtype, (5, 65))
    want, bound = int8_linear_float64(codes_of(x, SCALE), p.x_scale, p.codes, p.scale, bias, HALF_UNIT[dtype])
    assert_within(got, want, bound + (2.0**-25 if dtype == torch.float16 else 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_convolution_is_within_the_derived_bound(dtype: torch.dtype) -> None:
    p = Convolution()
    x = p.x.to(dtype)
    got = reference.int8_conv_static(x, *p.arguments(p.bias))
    weight = p.codes.double().view(5, 3, 3, 2) * p.scale.double().view(-1, 1, 1, 1)
    product = torch.nn.functional.conv2d(codes_of(x, SCALE).double() * p.x_scale.double(), weight, None, *MOVES)
    want = product + p.bias.double().view(-1, 1, 1)
    bound = 3 * U * product.abs() + (U + HALF_UNIT[dtype]) * want.abs()
    assert_within(got, want, bound * 1.01 + (2.0**-25 if dtype == torch.float16 else 0.0))


def test_the_linear_is_int8_linear_of_the_codes() -> None:
    p = Linear()
    of_rows = p.x_scale.expand(5, 1).contiguous()
    want = reference.int8_linear(codes_of(p.x, SCALE), of_rows, p.packed, p.scale, p.bias, 70, torch.float32)
    assert_same_bits(reference.int8_linear_static(p.x, *p.arguments(p.bias)), want)
    p.x_scale = p.x_scale.view(1)
    assert_same_bits(reference.int8_linear_static(p.x.view(1, 5, 70), *p.arguments(p.bias)), want.view(1, 5, 65))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_look_like_a_number(bad: float) -> None:
    p, c = Linear(), Convolution()
    x = p.x.clone()
    x[2, 3] = bad
    for spec in ("int8/tensor", "float8_e5m2/tensor", "fp4_e2m1/tensor"):
        got, clean = (reference.fake_quantize_static(v, p.x_scale, spec) for v in (x, p.x))
        assert int(got.isnan().sum()) == 1
        assert got[2, 3].isnan()
        assert_same_bits(got[:2], clean[:2])
    got, clean = (reference.int8_linear_static(v, *p.arguments(p.bias)) for v in (x, p.x))
    assert got[2].isnan().all()
    assert_same_bits(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    image = c.x.clone()
    image[1, 2, 8, 7] = bad
    got, clean = (reference.int8_conv_static(v, *c.arguments(c.bias)) for v in (image, c.x))
    assert got[1].isnan().all()
    assert_same_bits(got[0], clean[0])


@pytest.mark.parametrize(
    ("scale", "value"),
    [(0.0, 0.0), (2.0**-127, 0.0), (math.nan, math.nan), (math.inf, math.nan), (-1.0, math.nan)],
)
def test_scales_at_the_edges(scale: float, value: float) -> None:
    p = Linear()
    p.x_scale = torch.tensor(scale)
    got = reference.fake_quantize_static(torch.cat([p.x, p.x * 1e36]), p.x_scale, "int8/tensor")
    assert torch.equal(got.abs().nan_to_num(nan=9.0), torch.full_like(got, value).nan_to_num(nan=9.0))
    y = reference.int8_linear_static(p.x, *p.arguments(p.bias))
    assert torch.equal(y.nan_to_num(nan=9.0), (p.bias + value).expand(5, 65).nan_to_num(nan=9.0))


def test_a_scale_whose_factor_is_subnormal() -> None:
    x = torch.tensor([2.5e38, -2.5e38, 1e37])
    got = reference.fake_quantize_static(x, torch.tensor(2.0**127), "int8/tensor")
    assert torch.equal(got, torch.tensor([2.0**127, -(2.0**127), 0.0]))


def test_a_large_value_saturates_without_overflow() -> None:
    x = torch.tensor([3e38, -3e38, 1.0])
    got = reference.fake_quantize_static(x, torch.tensor(1e-10), "int8/tensor")
    assert torch.equal(got, torch.tensor([127.0, -127.0, 127.0]) * torch.tensor(1e-10))


@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    p, c = Linear(), Convolution()
    for ops in (reference, OPS):
        assert ops.int8_linear_static(torch.empty(shape), *p.arguments(p.bias)).shape == (*shape[:-1], 65)
        assert ops.fake_quantize_static(torch.empty(shape), p.x_scale, "int8/tensor").shape == shape
        assert ops.int8_conv_static(c.x[:0], *c.arguments()).shape == (0, 5, 5, 6)


# ---- gradients


@pytest.mark.parametrize(
    ("spec", "reach"), [("int8/tensor", 127.5), ("float8_e4m3fn/tensor", 464.0), ("fp4_e2m1/tensor", 7.0)]
)
def test_the_gradient_passes_where_nothing_was_cut_off(spec: str, reach: float) -> None:
    scale = torch.tensor(0.25)
    x = (
        torch.tensor([0.0, -1.0, reach - 0.25, -reach + 0.25, reach + 0.25, -reach - 0.25, 1e30, math.inf, math.nan])
        / 4
    )
    x.requires_grad_()
    OPS.fake_quantize_static(x, scale, spec).backward(torch.arange(1.0, 10.0))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def linear_of_rounded(p: Linear, x: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(OPS.fake_quantize_static(x, p.x_scale, "int8/tensor"), p.weight, bias)


def convolution_of_rounded(p: Convolution, x: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(OPS.fake_quantize_static(x, p.x_scale, "int8/tensor"), p.weight, bias, *MOVES)


@pytest.mark.parametrize(
    ("make", "op", "twin"),
    [
        (Linear, OPS.int8_linear_static, linear_of_rounded),
        (Convolution, OPS.int8_conv_static, convolution_of_rounded),
    ],
    ids=["linear", "convolution"],
)
def test_gradients_are_those_of_the_float_product_of_rounded_values(
    make: Callable[[], Any], op: Any, twin: Callable[..., Tensor]
) -> None:
    p = make()
    made = []
    for run in (lambda x, bias: op(x, *p.arguments(bias)), lambda x, bias: twin(p, x, bias)):
        x, bias = p.x.clone().requires_grad_(), p.bias.clone().requires_grad_()
        y = run(x, bias)
        y.backward(normal(*y.shape, seed=5))
        made.append((x.grad, bias.grad))
    (got_x, got_bias), (want_x, want_bias) = made
    assert_same_bits(got_x, want_x)  # the same library call, on a weight that is equal bit for bit
    torch.testing.assert_close(got_bias, want_bias, rtol=2.0**-18, atol=2.0**-18)
    assert int((got_x == 0).sum()) == int((p.x.abs() > 127.5 * SCALE).sum()) > 0


def test_the_gradient_keeps_the_dtype_of_x() -> None:
    p, c = Linear(), Convolution()
    for dtype in (torch.bfloat16, torch.float16):
        x, image = p.x.to(dtype).requires_grad_(), c.x.to(dtype).requires_grad_()
        OPS.int8_linear_static(x, *p.arguments()).sum().backward()
        OPS.int8_conv_static(image, *c.arguments()).sum().backward()
        OPS.fake_quantize_static(x, p.x_scale, "int8/tensor").sum().backward()
        assert x.grad is not None
        assert image.grad is not None
        assert x.grad.dtype == image.grad.dtype == dtype


def test_gradients_to_scales_are_refused() -> None:
    for p, op, name in ((Linear(), OPS.int8_linear_static, "linear"), (Convolution(), OPS.int8_conv_static, "conv")):
        x_scale, packed, scale, *rest = p.arguments()
        with pytest.raises(GradientsNeedTraining, match=rf"fxquant\.int8_{name}_static, weight scale"):
            op(p.x, x_scale, packed, scale.clone().requires_grad_(), *rest).sum().backward()
        with pytest.raises(GradientsNeedTraining, match=rf"fxquant\.int8_{name}_static, activation scale"):
            op(p.x, x_scale.clone().requires_grad_(), packed, scale, *rest).sum().backward()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.fake_quantize_static, scale"):
        OPS.fake_quantize_static(normal(3), torch.tensor(1.0, requires_grad=True), "int8/tensor").sum().backward()


# ---- compiled


def everything(x: Tensor, image: Tensor, bias: Tensor, p: Linear, c: Convolution) -> Tensor:
    y = OPS.int8_linear_static((x + 1).transpose(0, 1), *p.arguments(bias)).relu().sum(0)
    z = OPS.int8_conv_static(image * 2, *c.arguments()).sum()
    return y + z + OPS.fake_quantize_static(x, p.x_scale, "float8_e4m3fn/tensor").sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_forward_and_backward(dynamic: bool, fresh_dynamo: None) -> None:
    p, c = Linear(), Convolution()
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        results = []
        for run in (everything, compiled):
            x, image = normal(rows, 2, 70).requires_grad_(), c.x.clone().requires_grad_()
            bias = p.bias.clone().requires_grad_()
            y = run(x, image, bias, p, c)
            y.sum().backward()
            results.append((y, x.grad, image.grad, bias.grad))
        for got, want in zip(results[1], results[0], strict=True):
            assert_same_bits(got.detach(), want.detach())


# ---- errors: the same from reference and fake


def refused(name: str, args: tuple[Any, ...], error: type[FxQuantError], words: str) -> None:
    with pytest.raises(error) as caught:
        getattr(reference, name)(*args)
    assert words in str(caught.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error) as caught:
        getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["int8_linear_static", "int8_conv_static"])
def test_products_refuse_what_does_not_fit(name: str) -> None:
    p = Linear() if "linear" in name else Convolution()
    x_scale, packed, scale, bias, *rest = p.arguments()
    one = "float32 of shape [] or [1], one scale for the whole activation, is needed"
    refused(name, (p.x, torch.ones(2), packed, scale, bias, *rest), ShapeMismatch, one)
    refused(name, (p.x, x_scale.half(), packed, scale, bias, *rest), ShapeMismatch, one)
    refused(name, (p.x, x_scale.to("meta"), packed, scale, bias, *rest), ShapeMismatch, "x_scale on device meta")
    refused(name, (p.x.double(), x_scale, packed, scale, bias, *rest), UnsupportedActivation, "dtype torch.float64")
    refused(name, (p.x, x_scale, packed[:-1], scale, bias, *rest), ShapeMismatch, f"fxquant.{name}: met packed of")
    refused(name, (p.x, x_scale, packed, scale, torch.ones(3), *rest), ShapeMismatch, "met bias of shape [3]")
    refused(name, (p.x[:, :2], x_scale, packed, scale, bias, *rest), ShapeMismatch, "is needed")


def test_fake_quantize_static_refuses_what_does_not_fit() -> None:
    x, one = normal(3, 4), torch.ones(1)
    refused("fake_quantize_static", (x.double(), one, "int8/tensor"), UnsupportedActivation, "dtype torch.float64")
    refused("fake_quantize_static", (x, torch.ones(1, 1), "int8/tensor"), ShapeMismatch, "scale of shape [1, 1]")
    refused("fake_quantize_static", (x, one.double(), "int8/tensor"), ShapeMismatch, "dtype torch.float64")
    for spec in ("int8/token", "nvfp4", "fp8/group32"):
        refused("fake_quantize_static", (x, one, spec), InvalidSpec, "takes one float32 scale for the whole tensor")
    for spec in ("int4/tensor", "int8/channel", "int8/tensor/affine"):
        refused("fake_quantize_static", (x, one, spec), InvalidSpec, "takes int8 or a float format, symmetric")
