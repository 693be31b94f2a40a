"""Input that cannot be served is a named error; input that is only odd has a defined result."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import fxquant
from fxquant.errors import FxQuantError, NonFiniteWeight
from tests.models import sqnr

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PRESETS = ["int8dq", "int8wo", "int4wo", "fp8wo"]


def bare(model: nn.Module, preset: str = "int8dq") -> Callable[..., Any]:
    return torch.compile(model, backend="fxquant", options={"preset": preset, "executor": "eager"})


def with_model(model: nn.Module, preset: str = "int8dq") -> Callable[..., Any]:
    return fxquant.compile(model, preset, executor="eager")


def hidden(model: nn.Module, preset: str = "int8dq") -> Callable[..., Any]:
    """The model where Dynamo does not see it."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    return fxquant.compile(Outer(), preset, executor="eager")


DOORS = {"bare": bare, "compile": with_model, "in eager": hidden}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return DOORS[request.param]


def linear(in_features: int = 64, out_features: int = 48, **kwargs: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, **kwargs)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# ---- errors


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@torch.no_grad()
def test_activations_that_are_no_floats_fail_as_in_float(door: Callable[..., Any], dtype: torch.dtype) -> None:
    """torch refuses such a product itself, with the dtypes in its words; nothing of ours may let it pass."""
    x = torch.ones(3, 64).to(dtype)
    with pytest.raises(Exception, match=r"dtype|Half|Float|Long|complex"):
        linear()(x)
    with pytest.raises(Exception, match=r"(?i)dtype|float|long|complex"):
        door(linear())(x)


@torch.no_grad()
def test_another_k_fails_as_in_float(door: Callable[..., Any]) -> None:
    compiled = door(linear())
    for _ in range(2):  # before and after a good call
        with pytest.raises(Exception, match=r"same reduction dim|in_features is 64"):
            compiled(tokens(3, 63))
        assert compiled(tokens(3, 64)).shape == (3, 48)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@torch.no_grad()
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    last = linear()
    last.weight[3, 5] = value
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), last)
    words = r"weight '2' holds 1 non-finite value, the first at \[3, 5\]. .*rules=\{'2': None\}"
    for preset in PRESETS:
        with pytest.raises(NonFiniteWeight, match=words):
            with_model(model, preset)(tokens(2, 64))
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=rf"NonFiniteWeight.*{words}"):
            bare(model, preset)(tokens(2, 64))
        torch._dynamo.reset()
    with pytest.raises(NonFiniteWeight, match=r"inner\.2"):
        hidden(model)(tokens(2, 64))
    kept = fxquant.compile(model, rules={"2": None}, executor="eager")(tokens(2, 64))
    assert not kept[:, 3].isfinite().all()
    assert kept[:, :3].isfinite().all()


@torch.no_grad()
def test_a_bias_that_is_not_finite_is_an_honest_value(door: Callable[..., Any]) -> None:
    model = linear()
    model.bias[3] = float("-inf")
    y = door(model)(tokens(2, 64))
    assert torch.equal(y[:, 3], torch.full((2,), float("-inf")))
    assert y[:, :3].isfinite().all()


# ---- odd values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_token_that_is_not_finite_is_nan_and_only_that_one(
    door: Callable[..., Any], value: float, dtype: torch.dtype
) -> None:
    x, model = tokens(5, 64).to(dtype), linear().to(dtype)
    want = door(model)(x)
    torch._dynamo.reset()
    x[2, 7] = value
    got = door(model)(x)
    assert got[2].isnan().all()
    rest = [0, 1, 3, 4]
    assert torch.equal(got[rest], want[rest])


@torch.no_grad()
def test_zero_tokens_and_tiny_ones_give_the_bias(door: Callable[..., Any]) -> None:
    model = linear()
    x = torch.zeros(3, 64)
    x[1] = 1e-38  # below 2**-119: counted as zero
    assert torch.equal(door(model)(x), model.bias.expand(3, 48))


@pytest.mark.parametrize("magnitude", [3e38, 1e-30])
@torch.no_grad()
def test_huge_and_small_tokens_are_scaled(door: Callable[..., Any], magnitude: float) -> None:
    model, x = linear(bias=False), tokens(4, 64)
    x = x / x.abs().amax(-1, keepdim=True)
    got = door(model)(x * magnitude)
    assert 33.0 < sqnr(got / magnitude, model(x)) < 60.0


# ---- odd shapes


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 64), (2, 3, 4, 64)], ids=str)
@torch.no_grad()
def test_any_shape_that_a_linear_takes(door: Callable[..., Any], preset: str, shape: tuple[int, ...]) -> None:
    model, x = linear(), tokens(*shape)
    got, want = door(model, preset)(x), model(x)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    if x.numel():
        assert 15.0 < sqnr(got, want) < 60.0


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 33), (65, 1), (3, 129)])
@torch.no_grad()
def test_weights_of_any_size(door: Callable[..., Any], n: int, k: int) -> None:
    model, x = linear(k, n), tokens(5, k)
    got, want = door(model)(x), model(x)
    # One rounding of x and one of w of half a code each: 1/254 of the row's amax, K products in a row.
    bound = k * 2 / 254 * x.abs().amax(-1, keepdim=True) * model.weight.abs().amax(-1) * (1 + 1 / 254)
    assert ((got - want).abs() <= bound + 1e-6).all()


@torch.no_grad()
def test_an_input_with_gaps(door: Callable[..., Any]) -> None:
    model, base = linear(), tokens(6, 128)
    for x in (base[::2, ::2], base[:3, 64:], tokens(64, 3).t(), tokens(1, 64).expand(3, 64)):
        assert torch.equal(door(model)(x), door(model)(x.contiguous()))
        torch._dynamo.reset()


@torch.no_grad()
def test_a_batch_of_nothing_first_and_then_something(door: Callable[..., Any]) -> None:
    model, x = linear(), tokens(5, 64)
    compiled = door(model)
    assert compiled(x[:0]).shape == (0, 48)
    assert torch.equal(compiled(x), door(model)(x))


# ---- odd models


@pytest.mark.parametrize("make", [nn.Identity, nn.Sequential, nn.ReLU, lambda: nn.LayerNorm(64)])
@torch.no_grad()
def test_models_without_linears(door: Callable[..., Any], make: Callable[[], nn.Module]) -> None:
    model, x = make(), tokens(3, 64)
    assert torch.equal(door(model)(x), model(x))


@torch.no_grad()
def test_a_model_without_linears_has_a_report() -> None:
    view = fxquant.compile(nn.LayerNorm(64), executor="eager")
    view(tokens(3, 64))
    report = view.report()
    assert (report.coverage, report.uncovered) == (1.0, ())
    assert "no linears" in str(report)


class Counted(nn.Module):
    """A product of integers: no business of a quantizer's."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.arange(12).reshape(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table)


@torch.no_grad()
def test_a_weight_of_integers_is_left_and_named() -> None:
    model, x = Counted(), torch.arange(8).reshape(2, 4)
    view = fxquant.compile(model, executor="eager")
    assert torch.equal(view(x), model(x))
    (row,) = view.report().sites
    assert (row.status, row.reason) == ("declined", "a product of torch.int64 with torch.int64, not of floats")


@torch.no_grad()
def test_double_precision_is_computed_and_reported(door: Callable[..., Any]) -> None:
    model, x = linear().double(), tokens(3, 64).double()
    got = door(model)(x)
    assert got.dtype is torch.float64
    assert sqnr(got, model(x)) > 33.0


@torch.no_grad()
def test_weights_without_values_are_an_error() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(8, 8), torch.empty(2, 8)
    with pytest.raises(FxQuantError, match="meta"):
        fxquant.compile(model, executor="eager")(x)


# ---- errors travel


@torch.no_grad()
def test_an_error_of_the_backend_survives_pickling() -> None:
    model = linear()
    model.weight[0, 0] = float("nan")
    with pytest.raises(FxQuantError) as caught:
        with_model(model)(tokens(2, 64))
    twin = pickle.loads(pickle.dumps(caught.value))
    assert type(twin) is NonFiniteWeight
    assert str(twin) == str(caught.value)
