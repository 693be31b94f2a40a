from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import (
    FxQuantError,
    GradientsNeedTraining,
    InvalidSpec,
    ShapeMismatch,
    UnknownFormat,
    UnsupportedActivation,
)
from fxquant.numerics import MAX_IN_FEATURES
from fxquant.ops import reference
from tests.schemas import AFTER, AROUND
from tests.twins import assert_same_bits, assert_within, int8_linear_float64

OPS = torch.ops.fxquant
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 1, 1), (1, 33, 65), (17, 31, 63), (33, 128, 257), (0, 40, 9), (2, 1030, 64)]  # M, K, N


class Problem:
    """One linear: x [M, K], its codes, weights [N, K], packed, scale [N, 1] and bias [N]."""

    def __init__(self, m: int = 5, k: int = 70, n: int = 65, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(m + 7 * k + 11 * n)
        self.k, self.n = k, n
        self.x = torch.randn(m, k, generator=generator).to(dtype)
        self.weight = torch.randn(n, k, generator=generator)
        self.weight_codes, self.scale, _, _ = reference.quantize_weight(self.weight, "int8/channel")
        self.packed = reference.int8_pack(self.weight_codes)
        self.bias = torch.randn(n, generator=generator)
        self.codes, self.x_scale = reference.int8_quantize_per_token(self.x)

    @property
    def dequantized(self) -> Tensor:
        return self.weight_codes.float() * self.scale

    def linear(self, op: Callable[..., Tensor], x: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return op(self.x if x is None else x, self.packed, self.scale, bias, self.k)


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    p = Problem()
    x = p.x.clone().requires_grad_()
    deep = p.x.view(5, 1, 70).clone().requires_grad_()
    weight = p.weight.clone().requires_grad_()
    bias = p.bias.clone().requires_grad_()
    affine = reference.quantize_weight(p.weight, "int4/group32/affine")
    small = reference.quantize_weight(p.weight, "fp6_e3m2/group32")
    return {
        "quantize_dynamic-token": (OPS.quantize_dynamic.default, (p.x, "int8/token")),
        "quantize_dynamic-tensor": (OPS.quantize_dynamic.default, (p.x, "int8/tensor")),
        "quantize_dynamic-fp8": (OPS.quantize_dynamic.default, (p.x, "fp8/token")),
        "quantize_dynamic-nvfp4": (OPS.quantize_dynamic.default, (p.x.t(), "nvfp4")),
        "int8_quantize_per_token": (OPS.int8_quantize_per_token.default, (p.x.view(1, 5, 70),)),
        "quantize_weight-int8": (OPS.quantize_weight.default, (weight, "int8/channel")),
        "quantize_weight-int4": (OPS.quantize_weight.default, (weight, "int4/group32/affine")),
        "quantize_weight-fp8": (OPS.quantize_weight.default, (p.weight, "fp8/channel")),
        "quantize_weight-hqq": (OPS.quantize_weight.default, (p.weight, "int4/group32/affine/bf16", "hqq")),
        "quantize_weight-nvfp4": (OPS.quantize_weight.default, (p.weight, "nvfp4")),
        "dequantize": (OPS.dequantize.default, (p.weight_codes, p.scale, None, "int8/channel", torch.bfloat16)),
        "dequantize-affine": (OPS.dequantize.default, (*affine[:3], "int4/group32/affine", torch.float32)),
        "dequantize-fp6": (OPS.dequantize.default, (*small[:2], None, "fp6_e3m2/group32", torch.float16)),
        "pack_rows": (OPS.pack_rows.default, (affine[0], "int4/group32/affine")),
        "pack_rows-one": (
            OPS.pack_rows.default,
            (affine[0][:1, :5], "int4/group32/affine"),
        ),  # a row has its own strides
        "unpack_rows": (
            OPS.unpack_rows.default,
            (reference.pack_rows(small[0], "fp6_e3m2/group32"), "fp6_e3m2/group32", 70),
        ),
        "int8_pack": (OPS.int8_pack.default, (p.weight_codes,)),
        "int8_unpack": (OPS.int8_unpack.default, (p.packed, p.n, p.k)),
        "int8_linear_dynamic": (OPS.int8_linear_dynamic.default, (p.x, p.packed, p.scale, p.bias, p.k)),
        "int8_linear_dynamic-grad": (OPS.int8_linear_dynamic.default, (x, p.packed, p.scale, bias, p.k)),
        "int8_linear": (
            OPS.int8_linear.default,
            (p.codes, p.x_scale, p.packed, p.scale.view(-1), None, p.k, torch.float16),
        ),
        "int8_linear_weight_only": (
            OPS.int8_linear_weight_only.default,
            (p.x.half(), p.packed, p.scale, p.bias.half(), p.k),
        ),
        "int8_linear_weight_only-grad": (
            OPS.int8_linear_weight_only.default,
            (deep, p.packed, p.scale, bias, p.k),
        ),
    }


NAMES = list(samples())


# ---- torch's own checks


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    op, args = samples()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", NAMES)
def test_fake_has_shapes_dtypes_and_strides_of_the_reference(name: str) -> None:
    op, args = samples()[name]
    with torch.no_grad():
        real = getattr(reference, op._schema.name.partition("::")[2])(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    one, other = ((real,), (fake,)) if isinstance(real, Tensor) else (real, fake)
    for r, f in zip(one, other, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_schemas_are_the_agreed_ones() -> None:
    # The others have theirs in test_ops_attention.py, test_ops_coded.py, test_ops_convolution.py, test_ops_experts.py,
    # test_ops_static.py, test_ops_tiled.py, test_ops_weights.py and kernels/test_stored.py.
    elsewhere = {"pack_panels", "unpack_panels", "pack_granules", "decode_weight", "linear_weight_only"}
    elsewhere |= {"linear_dynamic", "int8_conv_dynamic", "conv_weight_only", "embedding_dequantize", "fake_quantize"}
    elsewhere |= {"fake_quantize_static", "fake_quantize_weight", "int8_linear_static", "int8_conv_static"}
    elsewhere |= {"embedding_packed", "tile_codes", "untile_codes", "transpose_granules", "decode_tiles"}
    elsewhere |= {"tiled_linear", "tiled_linear_codes", "norm_quantize", "attention"}
    elsewhere |= {"rows_of_packed", "packed_of_rows"}
    elsewhere |= {"experts_linear", "experts_linear_backward", "experts_matmul", "experts_outer"}
    found = {str(getattr(OPS, name).default._schema) for name in reference.__all__ if name not in elsewhere}
    assert found == {
        "fxquant::rotary(Tensor x, Tensor cos, Tensor sin, int isa=0) -> Tensor",
        "fxquant::shared(Tensor x) -> Tensor",
        "fxquant::quantize_dynamic(Tensor x, str spec) -> (Tensor codes, Tensor scale, Tensor tensor_scale)",
        'fxquant::quantize_weight(Tensor w, str spec, str algorithm="auto") '
        "-> (Tensor codes, Tensor scale, Tensor zero_point, Tensor tensor_scale)",
        "fxquant::dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, ScalarType dtype, "
        "Tensor? tensor_scale=None) -> Tensor",
        "fxquant::pack_rows(Tensor codes, str spec) -> Tensor rows",
        "fxquant::unpack_rows(Tensor rows, str spec, int width) -> Tensor codes",
        "fxquant::decode_rows(Tensor rows, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, int width, "
        "str spec, ScalarType dtype) -> Tensor",
        "fxquant::int8_quantize_per_token(Tensor x) -> (Tensor codes, Tensor scale)",
        "fxquant::quantize_static(Tensor x, Tensor scale, str spec) -> (Tensor codes, Tensor scale)",
        "fxquant::int8_pack(Tensor codes) -> Tensor packed",
        "fxquant::int8_unpack(Tensor packed, int out_features, int in_features) -> Tensor codes",
        "fxquant::int8_linear_dynamic(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int in_features, "
        f"int isa=0, {AROUND}) -> Tensor",
        "fxquant::int8_linear(Tensor codes, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, "
        f"int in_features, ScalarType dtype, int isa=0, {AFTER}) -> Tensor",
        "fxquant::int8_linear_weight_only(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int in_features, "
        f"int isa=0, {AROUND}) -> Tensor",
    }


@pytest.mark.parametrize("name", reference.__all__)
def test_references_take_what_their_schemas_say(name: str) -> None:
    arguments = [a.name for a in getattr(OPS, name).default._schema.arguments]
    assert list(inspect.signature(getattr(reference, name)).parameters) == arguments


@pytest.mark.parametrize("name", reference.__all__)
def test_each_op_keeps_strides_and_is_pt2_compliant(name: str) -> None:
    assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(getattr(OPS, name).default.tags)


# ---- the numbers of the linears, on the references


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_dynamic_linear_is_within_the_derived_bound(
    m: int, k: int, n: int, with_bias: bool, dtype: torch.dtype
) -> None:
    p = Problem(m, k, n, dtype)
    bias = p.bias if with_bias else None
    got = p.linear(reference.int8_linear_dynamic, bias=bias)
    assert (got.dtype, got.shape) == (dtype, (m, n))
    want, bound = int8_linear_float64(p.codes, p.x_scale, p.weight_codes, p.scale, bias, HALF_UNIT[dtype])
    # 2**-24: one step of float16's subnormals, halved; rounding is absolute down there.
    assert_within(got, want, bound + (2.0**-25 if dtype == torch.float16 else 0.0))


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_integer_sums_with_scales_of_powers_of_two_are_exact(m: int, k: int, n: int) -> None:
    p = Problem(m, k, n)
    x_scale, scale = torch.full((m, 1), 2.0**-7), torch.full((n, 1), 2.0**-5)
    got = reference.int8_linear(p.codes, x_scale, p.packed, scale, None, k, torch.float32)
    want = p.codes.double() @ p.weight_codes.double().t() * 2.0**-12
    assert_same_bits(got, want.float())
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_weight_only_linear_is_within_the_derived_bound(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    p = Problem(m, k, n, dtype)
    got = p.linear(reference.int8_linear_weight_only, bias=p.bias)
    x, w = p.x.double(), p.weight_codes.double() * p.scale.double()
    want = x @ w.t() + p.bias.double()
    u = 2.0**-24
    gamma = (k + 1) * u / (1 - (k + 1) * u)  # K products and sums, and the scale
    bound = gamma * (x.abs() @ w.abs().t()) + (u + HALF_UNIT[dtype]) * want.abs()
    assert_within(got, want, bound * (1 + 2.0**-7) + (2.0**-25 if dtype == torch.float16 else 0.0))


def test_the_two_int8_linears_agree_bit_for_bit() -> None:
    p = Problem(9, 130, 70, torch.bfloat16)
    whole = p.linear(reference.int8_linear_dynamic, bias=p.bias)
    parts = reference.int8_linear(p.codes, p.x_scale, p.packed, p.scale, p.bias, p.k, torch.bfloat16)
    assert_same_bits(whole, parts)


@pytest.mark.parametrize("name", ["int8_linear_dynamic", "int8_linear_weight_only"])
def test_any_strides_and_dimensions(name: str) -> None:
    p, op = Problem(6, 70, 65), getattr(reference, name)
    want = p.linear(op, bias=p.bias)
    assert_same_bits(p.linear(op, p.x.t().contiguous().t(), p.bias), want)
    wide = torch.zeros(6, 140)
    wide[:, ::2] = p.x
    assert_same_bits(p.linear(op, wide[:, ::2], p.bias), want)
    assert_same_bits(p.linear(op, p.x.view(2, 1, 3, 70), p.bias), want.view(2, 1, 3, 65))
    assert_same_bits(p.linear(op, p.x[:1].expand(4, 70), p.bias), p.linear(op, p.x[:1].repeat(4, 1), p.bias))
    assert_within(p.linear(op, p.x[0], p.bias), want[0].double(), torch.full((65,), 1e-4 if "only" in name else 0.0))


@pytest.mark.parametrize("name", ["int8_linear_dynamic", "int8_linear_weight_only"])
@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70)])
def test_no_rows(name: str, shape: tuple[int, ...]) -> None:
    p = Problem()
    for op in (getattr(reference, name), getattr(OPS, name)):
        assert p.linear(op, torch.empty(shape), p.bias).shape == (*shape[:-1], 65)


def test_a_row_that_is_not_finite_is_nan_and_leaves_others_alone() -> None:
    p = Problem()
    clean = p.linear(reference.int8_linear_dynamic, bias=p.bias)
    p.x[2, 3] = torch.inf
    got = p.linear(reference.int8_linear_dynamic, bias=p.bias)
    assert got[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert_same_bits(got[keep], clean[keep])


def test_zero_row_gives_the_bias() -> None:
    p = Problem()
    p.x[1] = 0
    assert torch.equal(p.linear(reference.int8_linear_dynamic, bias=p.bias)[1], p.bias)


@pytest.mark.parametrize("name", ["int8_linear_dynamic", "int8_linear_weight_only"])
def test_autocast_does_not_change_the_numbers(name: str) -> None:
    p = Problem()
    want = p.linear(getattr(reference, name), bias=p.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(p.linear(getattr(reference, name), bias=p.bias), want)


def test_scale_may_have_one_dimension() -> None:
    p = Problem()
    want = p.linear(reference.int8_linear_dynamic)
    p.scale = p.scale.view(-1)
    assert_same_bits(p.linear(reference.int8_linear_dynamic), want)


def test_per_token_is_quantize_dynamic() -> None:
    x = torch.randn(3, 4, 9)
    one, other = reference.int8_quantize_per_token(x), reference.quantize_dynamic(x, "int8/token")[:2]
    assert_same_bits(one[0], other[0])
    assert_same_bits(one[1], other[1])


def test_quantize_then_dequantize_through_the_dispatcher() -> None:
    w = torch.randn(9, 70)
    for spec in ("int8/channel", "int4/group32/affine", "float8_e4m3fn/channel", "int4/group7", "nvfp4"):
        codes, scale, zero, whole = OPS.quantize_weight(w, spec)
        back = OPS.dequantize(codes, scale, zero, spec, torch.float32, whole)
        want = reference.quantize_weight(w, spec)
        assert_same_bits(back, reference.dequantize(*want[:3], spec, torch.float32, want.tensor_scale))
        # Half the widest gap, from 4 to 6 of nvfp4's 6, under a scale rounded up by 1/16: less than a fifth.
        assert (back - w).abs().max() < w.abs().max() / 5


# ---- errors: the same from reference, dispatcher and fake


def refused(name: str, args: tuple[Any, ...], error: type[FxQuantError], words: str) -> None:
    with pytest.raises(error) as caught:
        getattr(reference, name)(*args)
    assert words in str(caught.value)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error) as caught:
        getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float64, torch.float8_e4m3fn])
def test_activations_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    p = Problem()
    x = torch.zeros(2, 70).to(dtype)
    words = f"the activation has dtype {dtype}, but float32, bfloat16 or float16 is needed"
    refused("int8_quantize_per_token", (x,), UnsupportedActivation, words)
    refused("quantize_dynamic", (x, "int8/token"), UnsupportedActivation, words)
    for name in ("int8_linear_dynamic", "int8_linear_weight_only"):
        refused(name, (x, p.packed, p.scale, None, 70), UnsupportedActivation, f"fxquant.{name}: {words}")


@pytest.mark.parametrize("name", ["int8_linear_dynamic", "int8_linear_weight_only"])
def test_linears_refuse_what_does_not_fit(name: str) -> None:
    p = Problem()

    def case(words: str, **other: Any) -> None:
        given = {"x": p.x, "packed": p.packed, "scale": p.scale, "bias": None, "in_features": 70} | other
        refused(name, tuple(given.values()), ShapeMismatch, words)

    case("met an activation of shape [5, 69], but last dimension 70 is needed", x=p.x[:, :69])
    case("met an activation without dimensions", x=torch.tensor(1.0))
    case(
        "met packed of shape [4550], but [4810] for a weight [65, 74] is needed",
        x=torch.zeros(5, 74),
        in_features=74,
    )
    case("met scale of shape [1, 65] and dtype torch.float32", scale=p.scale.t())
    case("and dtype torch.float16, but float32 of shape [N, 1] or [N]", scale=p.scale.half())
    case("met packed of dtype torch.uint8, but torch.int8", packed=p.packed.view(torch.uint8))
    case("met packed of 2 dimensions, but 1 is needed", packed=p.weight_codes)
    case("met bias of shape [64] and dtype torch.float32, but a float bias of shape [65]", bias=p.bias[:64])
    case("bias of shape [65] and dtype torch.int32", bias=p.bias.int())
    case("in_features 16777217, but at most 16777216", in_features=MAX_IN_FEATURES + 1)
    meta = "on device meta, but cpu, where x is, is needed"
    case(f"met packed {meta}", packed=p.packed.to("meta"))
    case(f"met scale {meta}", scale=p.scale.to("meta"))
    case(f"met bias {meta}", bias=p.bias.to("meta"))


def test_int8_linear_refuses_what_does_not_fit() -> None:
    p = Problem()

    def case(words: str, **other: Any) -> None:
        given = {"codes": p.codes, "x_scale": p.x_scale, "packed": p.packed, "scale": p.scale, "bias": None}
        given |= {"in_features": 70, "dtype": torch.float32} | other
        refused("int8_linear", tuple(given.values()), ShapeMismatch, words)

    case("met codes of dtype torch.float32, but torch.int8", codes=p.x)
    case("met x_scale of shape [1, 1] and dtype torch.float32, but float32 of shape [5, 1]", x_scale=p.x_scale[:1])
    case("met x_scale on device meta, but cpu, where codes is, is needed", x_scale=p.x_scale.to("meta"))
    case("met output dtype torch.int8, but float32, bfloat16 or float16", dtype=torch.int8)
    case("met an activation of shape [5, 69]", codes=p.codes[:, :69])


@pytest.mark.parametrize("name", ["int8_linear_dynamic", "int8_linear_weight_only"])
def test_a_weight_without_data_is_refused_by_the_dispatcher(name: str) -> None:
    """Beside a meta tensor the dispatcher runs the fake on real tensors: its answer would be unwritten memory."""
    p = Problem()
    with pytest.raises(ShapeMismatch, match="met packed on device meta, but cpu, where x is, is needed"):
        getattr(OPS, name)(p.x, p.packed.to("meta"), p.scale, None, p.k)
    with pytest.raises(ShapeMismatch, match="met scale on device meta, but cpu, where codes is, is needed"):
        OPS.dequantize(p.weight_codes, p.scale.to("meta"), None, "int8/channel", torch.float32)


def test_the_other_ops_refuse_what_does_not_fit() -> None:
    p = Problem()
    refused("int8_pack", (p.weight,), ShapeMismatch, "met codes of dtype torch.float32, but torch.int8 is needed")
    refused("int8_pack", (p.weight_codes[0],), ShapeMismatch, "met codes of 1 dimensions, but 2 is needed")
    refused("int8_unpack", (p.packed, 129, 70), ShapeMismatch, "is needed")
    refused("quantize_weight", (p.weight_codes, "int8/channel"), ShapeMismatch, "met a weight of dtype torch.int8")
    refused("quantize_weight", (p.weight[0], "int8/block2x4"), ShapeMismatch, "met a tensor of shape [70] for spec")
    refused("quantize_weight", (p.weight, "int9/channel"), UnknownFormat, "Did you mean 'int8'?")
    refused("quantize_dynamic", (p.x, "int8/channel"), InvalidSpec, "sample or group, such as int8/token")
    refused(
        "quantize_dynamic", (p.x, "int4/token"), InvalidSpec, "fxquant.quantize_dynamic takes int8 or a float format"
    )
    refused("quantize_dynamic", (p.x, "int8/token/affine"), InvalidSpec, "symmetric")
    good = (p.weight_codes, p.scale, None, "int8/channel", torch.float32)
    refused("dequantize", (p.weight, *good[1:]), ShapeMismatch, "met codes of dtype torch.float32, but torch.int8")
    refused("dequantize", (good[0], p.scale[:3], *good[2:]), ShapeMismatch, "but torch.float32 of shape [65, 1]")
    refused("dequantize", (*good[:4], torch.int32), ShapeMismatch, "met dtype torch.int32, but a float dtype")
    codes, scale, zero, _ = reference.quantize_weight(p.weight, "int4/group32/affine")
    affine = ("int4/group32/affine", torch.float32)
    refused("dequantize", (codes, scale, None, *affine), ShapeMismatch, "met no zero_point")
    refused("dequantize", (codes, scale, zero[:1], *affine), ShapeMismatch, "met zero_point of shape [1, 3]")


# ---- gradients


@pytest.mark.parametrize("name", ["int8_linear_dynamic", "int8_linear_weight_only"])
def test_gradient_is_that_of_the_dequantized_linear(name: str) -> None:
    p = Problem()
    x = p.x.view(5, 1, 70).clone().requires_grad_()
    bias = p.bias.clone().requires_grad_()
    grad = torch.randn(5, 1, 65)
    p.linear(getattr(OPS, name), x, bias).backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    want = grad.double() @ p.dequantized.double()
    gamma = 66 * 2.0**-24 / (1 - 66 * 2.0**-24)
    assert_within(x.grad, want, gamma * (grad.double().abs() @ p.dequantized.double().abs()))
    assert_within(bias.grad, grad.double().sum((0, 1)), gamma * grad.double().abs().sum((0, 1)))


def test_gradient_keeps_the_dtype_of_x() -> None:
    p = Problem(dtype=torch.bfloat16)
    x = p.x.clone().requires_grad_()
    p.linear(OPS.int8_linear_dynamic, x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_gradients_that_are_not_served_are_refused_by_name() -> None:
    p = Problem()
    x = p.x.clone().requires_grad_()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.int8_quantize_per_token: a gradient was asked for"):
        OPS.int8_quantize_per_token(x)[1].sum().backward()
    codes, x_scale, _ = OPS.quantize_dynamic(x, "int8/token")
    assert not codes.requires_grad
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.int8_linear: a gradient"):
        OPS.int8_linear(codes, x_scale, p.packed, p.scale, None, p.k, torch.float32).sum().backward()
    scale = p.scale.clone().requires_grad_()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.dequantize: a gradient"):
        OPS.dequantize(p.weight_codes, scale, None, "int8/channel", torch.float32).sum().backward()
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.int8_linear_dynamic, weight scale: a gradient"):
        OPS.int8_linear_dynamic(x, p.packed, scale, None, p.k).sum().backward()


def test_codes_of_a_weight_are_constants() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8))
    assert not any(t.requires_grad for t in OPS.quantize_weight(weight, "int8/channel"))


# ---- compiled and exported


class Linears(torch.nn.Module):
    """Both int8 linears, with float work around them that a compiler may fuse and re-lay."""

    def __init__(self) -> None:
        super().__init__()
        p = Problem()
        self.register_buffer("packed", p.packed)
        self.register_buffer("scale", p.scale)

    def forward(self, x: Tensor) -> Tensor:
        packed, scale = self.get_buffer("packed"), self.get_buffer("scale")
        y = OPS.int8_linear_dynamic((x + 1).transpose(0, 1), packed, scale, None, 70)
        codes, x_scale = OPS.int8_quantize_per_token(x * 2)
        z = OPS.int8_linear(codes, x_scale, packed, scale, None, 70, torch.float32)
        return torch.relu(y.transpose(0, 1) + z) + OPS.int8_linear_weight_only(x, packed, scale, None, 70)


# Inductor's own import of torch.jit warns, once a process.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Linears()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for rows in (3, 5):
            x = torch.randn(rows, 2, 70)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_exports_with_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    model = Linears()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(4, 2, 70),), dynamic_shapes=({0: batch},))
    targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert targets.count("fxquant.int8_linear_dynamic.default") == 1
    x = torch.randn(7, 2, 70)
    assert_same_bits(exported.module()(x), model(x))


def test_a_wrong_shape_is_named_while_compiling() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Linears(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"met an activation of shape \[.*69\], but last dimension 70 is needed"):
        compiled(torch.randn(3, 2, 69))


def test_autograd_keys_can_be_left_out_by_a_runner() -> None:
    p = Problem()
    want = p.linear(OPS.int8_linear_dynamic)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        got = p.linear(OPS.int8_linear_dynamic)
        view = got[1:]
    assert_same_bits(got, want)
    assert view._is_view()  # views stay views of their base
