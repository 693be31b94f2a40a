"""Input that is odd or wrong, through the compile door, in every format: a named error, or what the definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.algorithms import quantize
from fxquant.errors import (
    InvalidOption,
    InvalidSpec,
    NonFiniteWeight,
    PatternMatchesNothing,
    UnknownFormat,
    UnknownPreset,
)
from fxquant.numerics import decode
from fxquant.spec import INT8, PRESETS, LinearSpec, QuantConfig, TensorSpec, linear_spec
from fxquant.spec.kinds import conv_spec

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# Granularities that the kernels take; the others run as a float product.
KERNEL_ROWS = ["tensor", "channel", "block7x9"]
# One of each way in which a linear runs.
KINDS_OF_PRESET = ["int8dq", "int8wo", "int4wo", "int4dq", "int2wo", "fp8dq", "fp6_e3m2", "mxfp4", "nvfp4"]


def view_of(model: nn.Module, config: Any, **fields: Any) -> Any:
    return fxquant.compile(model, config, executor="eager", **fields)


def linear(in_features: int = 64, out_features: int = 48, **kwargs: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, **kwargs)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def decoded(t: Tensor, spec: TensorSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the codes of t stand for, rounded to `dtype`, in float64."""
    found = quantize(t, spec)
    return decode(found.codes, found.scale, found.zero_point, spec, dtype, found.tensor_scale).double()


def assert_is_the_product(got: Tensor, x: Tensor, model: nn.Linear, spec: LinearSpec) -> None:
    """`got` is the product of the decoded operands, up to the order and the roundings of a float32 sum.

    The usual bound of a dot product, with 8 more roundings for those of decoding and of scaling sums, and one to the
    output type. int8 activations are multiplied as codes; others are decoded to the type of x first.
    """
    assert spec.weights is not None
    w = decoded(model.weight.detach(), spec.weights)
    seen = x.double()
    if spec.activations is not None:
        seen = decoded(x, spec.activations, torch.float32 if spec.activations.format == INT8 else x.dtype)
    bias = torch.zeros(1, dtype=torch.float64) if model.bias is None else model.bias.detach().double()
    want = seen @ w.t() + bias
    roundings = (x.shape[-1] + 8) * 2.0**-24
    size = seen.abs() @ w.abs().t() + bias.abs()
    step = torch.finfo(got.dtype).eps * want.abs().clamp(min=torch.finfo(got.dtype).smallest_normal)
    bound = (roundings / (1 - roundings) * size + step / 2) * (1 + 2.0**-20)
    assert ((got.double() - want).abs() <= bound).all()


# ---- sizes


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("n", "k"), [(48, 64), (3, 1), (5, 31), (7, 160)])
@torch.no_grad()
def test_every_preset_computes_the_product_of_its_spec_at_every_size(preset: str, n: int, k: int) -> None:
    """No size is skipped: torchao's int4 stays float, without a word, where K is no multiple of the group."""
    model, x = linear(k, n), tokens(6, k)
    view = view_of(model, preset)
    assert_is_the_product(view(x), x, model, PRESETS[preset])
    (row,) = view.report().sites
    assert row.is_quantized
    assert row.spec_text.startswith(str(PRESETS[preset]))


@pytest.mark.parametrize("size", [1, 7, 64, 65, 2**31 - 1])
@torch.no_grad()
def test_any_group_size_is_a_group_size(size: int) -> None:
    """A group larger than a row is one group a row."""
    model, x = linear(), tokens(6, 64)
    got = view_of(model, {"weights": "int4", "group_size": size})(x)
    spec = linear_spec(f"w=int4/group{min(size, 64)}/affine/bf16")
    assert spec is not None
    assert_is_the_product(got, x, model, spec)


@pytest.mark.parametrize("preset", KINDS_OF_PRESET)
@torch.no_grad()
def test_empty_batches_and_layers_give_what_float_gives(preset: str) -> None:
    """Nothing in, nothing out; without inputs the sum is empty, and the bias is left."""
    for k, n, shape in ((64, 48, (0, 64)), (64, 48, (2, 0, 64)), (64, 0, (3, 64)), (0, 48, (3, 0))):
        with torch.no_grad():
            model = nn.Linear(64, 48)
            model.weight = nn.Parameter(torch.zeros(n, k))
            model.bias = nn.Parameter(torch.arange(n, dtype=torch.float32))
        x = tokens(*shape)
        torch._dynamo.reset()
        got = view_of(model, preset)(x)
        assert torch.equal(got, model(x)), (k, n, shape)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "channel-2", "channel1", "channel-1", "block7x9"])
@pytest.mark.parametrize("activations", ["none", "int8", "mxfp8"])
@torch.no_grad()
def test_every_granularity_of_weights_runs(granularity: str, activations: str) -> None:
    model, x = linear(31, 20), tokens(6, 31)
    for weights in ("int8", "int4", "fp6_e3m2"):
        torch._dynamo.reset()
        text = f"{weights}/{granularity}"
        got = view_of(model, {"weights": text, "activations": activations}, strict=granularity in KERNEL_ROWS)(x)
        spec = QuantConfig(weights=text, activations=activations).default_spec
        assert spec is not None
        assert_is_the_product(got, x, model, spec)


# ---- values


@pytest.mark.parametrize("preset", KINDS_OF_PRESET)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@torch.no_grad()
def test_a_weight_that_is_not_finite_is_named_in_every_format(preset: str, value: float) -> None:
    last = linear()
    last.weight[3, 5] = value
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), last)
    with pytest.raises(NonFiniteWeight, match=r"weight '2' holds 1 non-finite value, the first at \[3, 5\]"):
        view_of(model, preset)(tokens(2, 64))


@pytest.mark.parametrize("preset", ["int8dq", "int4wo", "fp6_e3m2", "mxfp4"])
@torch.no_grad()
def test_a_weight_of_integers_is_left_and_named_whatever_the_format(preset: str) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor
            self.register_buffer("table", torch.arange(12).reshape(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.table)

    model, x = Counted(), torch.arange(8).reshape(2, 4)
    view = view_of(model, preset)
    assert torch.equal(view(x), model(x))
    (row,) = view.report().sites
    assert (row.status, row.reason) == ("declined", "a product of torch.int64 with torch.int64, not of floats")


@pytest.mark.parametrize("preset", KINDS_OF_PRESET)
@torch.no_grad()
def test_half_precision_does_not_overflow_where_the_float_layer_does_not(preset: str) -> None:
    """torchao's int8 weight-only sums codes in float16 and scales afterwards: 1024 * 127 is infinite there."""
    model = nn.Linear(1024, 8, bias=False)
    model.weight.fill_(0.01)
    model, x = model.half(), torch.ones(3, 1024, dtype=torch.float16)
    assert model(x).isfinite().all()
    got = view_of(model, preset)(x)
    assert got.dtype == torch.float16
    assert_is_the_product(got, x, model, PRESETS[preset])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", KINDS_OF_PRESET)
@torch.no_grad()
def test_tiny_weights_of_half_precision_keep_their_values(preset: str, dtype: torch.dtype) -> None:
    """Quanto's scale, computed in float16, is zero for a weight of 1e-6 and less."""
    model = linear(bias=False)
    model.weight.mul_(8e-6)
    model, x = model.to(dtype), tokens(4, 64).to(dtype)
    assert_is_the_product(view_of(model, preset)(x), x, model, PRESETS[preset])


# ---- convolutions and embeddings


@pytest.mark.parametrize("preset", KINDS_OF_PRESET)
@torch.no_grad()
def test_a_convolution_runs_in_every_preset(preset: str) -> None:
    """torchao's int8 configs take a Conv2d and fail in its forward. Here it is the convolution of decoded operands."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 5, 3, stride=2, padding=1), tokens(2, 3, 9, 7)
    spec = conv_spec(PRESETS[preset])
    assert spec.weights is not None
    assert model.bias is not None
    w = decoded(model.weight.flatten(1), spec.weights).view(5, 3, 3, 3)
    seen = x.double() if spec.activations is None else decoded(x, spec.activations)
    want = F.conv2d(seen, w, model.bias.double(), 2, 1)
    size = F.conv2d(seen.abs(), w.abs(), model.bias.double().abs(), 2, 1)
    view = view_of(model, preset)
    assert ((view(x).double() - want).abs() <= (27 + 8) * 2.0**-23 * size).all()
    (row,) = view.report().sites
    assert (row.op, row.is_quantized) == ("conv", True)
    assert view(x[:0]).shape == (0, 5, 5, 4)


@pytest.mark.parametrize("text", ["int8", "int4", "int2", "fp8", "fp6_e3m2", "mxfp4", "nvfp4"])
@torch.no_grad()
def test_an_embedding_gives_the_decoded_rows_and_refuses_what_float_refuses(text: str) -> None:
    torch.manual_seed(0)
    model, ids = nn.Embedding(11, 37), torch.tensor([[0, 10, 3], [3, 3, 9]])
    decision = QuantConfig(embeddings=text).default_for("embedding")
    assert decision.spec is not None
    assert decision.spec.weights is not None
    view = view_of(model, "int8wo", embeddings=text)
    assert torch.equal(view(ids).double(), decoded(model.weight, decision.spec.weights)[ids])
    assert view(ids[:0]).shape == (0, 3, 37)
    with pytest.raises(Exception, match=r"(?i)index|range"):
        view(torch.tensor([[11, 0, 0]]))


@pytest.mark.parametrize("preset", ["int8dq", "int4wo", "mxfp4"])
@torch.no_grad()
def test_weights_of_convolutions_and_embeddings_that_are_not_finite_are_named(preset: str) -> None:
    conv, table = nn.Conv1d(4, 4, 3), nn.Embedding(8, 4)
    conv.weight[1, 2, 0] = float("nan")
    table.weight[5, 1] = float("inf")
    with pytest.raises(NonFiniteWeight, match=r"weight '0' holds 1 non-finite value, the first at \[1, 2, 0\]"):
        view_of(nn.Sequential(conv), preset)(tokens(1, 4, 8))
    with pytest.raises(NonFiniteWeight, match=r"weight '0' holds 1 non-finite value, the first at \[5, 1\]"):
        view_of(nn.Sequential(table), preset, embeddings="int8")(torch.tensor([1, 2]))
    assert view_of(nn.Sequential(table), preset)(torch.tensor([5])).isinf().any()  # float by default, and as it is


# ---- configurations


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (UnknownPreset, {"preset": "int4woo"}, "Did you mean 'int4wo'?"),
        (UnknownFormat, {"weights": "int9"}, "Did you mean 'int8'?"),
        (UnknownFormat, {"weights": "fp6_e4m3"}, "Did you mean 'fp"),
        (UnknownFormat, {"embeddings": "mxpf8"}, "Did you mean 'mxfp8'?"),
        (InvalidOption, {"weights": "int4", "group_size": 0}, "at least 1"),
        (InvalidOption, {"weights": "int4", "group_size": -128}, "at least 1"),
        (InvalidOption, {"weights": "int4", "group_size": 12.5}, "at least 1"),
        (InvalidOption, {"weights": "int4", "group_size": 10**12}, "at most 2147483647"),
        (InvalidOption, {"preset": "mxfp8", "group_size": 64}, "are 32 values by definition"),
        (InvalidOption, {"weights": "int4/group32", "group_size": 64}, "give one of the two"),
        (InvalidOption, {"weights": "int8", "activations": "int6"}, "activations are int8 or a float format"),
        (InvalidOption, {"preset": "int8wo", "algorithm": "minmax"}, "minmax is for affine or shift weights"),
        (InvalidSpec, {"rules": {"lm_head": "int4wo algorithm=absmax"}}, "absmax is for symmetric weights"),
        (InvalidSpec, {"weights": "int4/group0"}, "a granularity is tensor"),
        (InvalidSpec, {"weights": "fp6_e3m2/group32/affine"}, "a zero point needs an integer format"),
        (InvalidSpec, {"weights": "fp4_e2m1/channel/e8m0"}, "e8m0 scales are for symmetric groups"),
        (PatternMatchesNothing, {"rules": {"lm_haed": "int4wo"}}, "no module matches 'lm_haed'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_anything_runs(
    error: type[Exception], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(error) as caught:
        fxquant.compile(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}), options)
    assert words in str(caught.value)
