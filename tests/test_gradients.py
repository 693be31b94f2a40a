"""Inference in grad mode: a forgotten no_grad is served with one warning, a wish for gradients is an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxquant
from fxquant.errors import ForgottenNoGradWarning, GradientsNeedTraining
from fxquant.gradients import InferenceOnly
from tests.models import Decoder
from tests.test_fallback import Broken, Disabled, Host

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

IDS = torch.arange(12).reshape(2, 6)


def bare(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend=fxquant.backend, options={"executor": "eager"})


def with_model(model: nn.Module) -> Callable[..., Any]:
    return fxquant.compile(model, executor="eager")


def warned(run: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and how many warnings of a forgotten no_grad came with it; no other warning may come."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    assert {w.category for w in caught} <= {ForgottenNoGradWarning}
    return result, len(caught)


@pytest.mark.parametrize("compile_", [bare, with_model])
def test_a_forgotten_no_grad_is_served_with_one_warning(compile_: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    with torch.no_grad():
        want = compile_(model)(IDS)
    torch._dynamo.reset()
    compiled = compile_(model)
    y, count = warned(lambda: (compiled(IDS), compiled(IDS))[1])
    assert count == 1
    assert torch.equal(y, want)
    assert not y.requires_grad


@pytest.mark.parametrize("block", [Disabled, Broken])
def test_a_graph_break_is_no_reason_for_an_error(block: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Host(block()).eval(), torch.randn(5, 64)
    with torch.no_grad():
        want = with_model(model)(x)
    compiled = with_model(model)
    y, count = warned(lambda: compiled(x))
    assert count == 1
    assert torch.equal(y, want)


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((64,), 2.0))

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Embedded(nn.Module):
    """Between its two graphs stands an eager product with a parameter: what comes of it requires grad."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.scaled = Factor()
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scaled(self.first(x)))


@pytest.mark.parametrize("compile_", [bare, with_model])
def test_a_value_that_only_parameters_made_is_served(compile_: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, x = Embedded(), torch.randn(5, 64)
    with torch.no_grad():
        want = compile_(model)(x)
    y, count = warned(lambda: compile_(model)(x))
    assert torch.equal(y, want)
    assert count >= 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own, for inputs that are no leaves
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x * 2.0, lambda x: nn.Linear(64, 64)(x) + x])
def test_an_input_that_wants_a_gradient_is_an_error(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.randn(5, 64, requires_grad=True))
    with pytest.raises(GradientsNeedTraining, match=r"torch\.no_grad"):
        with_model(nn.Linear(64, 64))(x)
    with pytest.raises(BackendCompilerFailed, match="a gradient was asked for"):
        bare(nn.Linear(64, 64))(x)
    with torch.no_grad():
        assert not with_model(nn.Linear(64, 64))(x).requires_grad


def test_a_later_call_is_watched_too() -> None:
    """Dynamo guards on requires_grad, not on where a gradient would go: the same graph serves both inputs."""
    model = nn.Linear(64, 64)
    compiled = with_model(model)
    _, count = warned(lambda: compiled(nn.Linear(64, 64)(torch.randn(5, 64))))
    assert count == 1
    with pytest.raises(GradientsNeedTraining):
        compiled(torch.randn(5, 64, requires_grad=True) * 2.0)


def test_eager_linears_refuse_too() -> None:
    with pytest.raises(GradientsNeedTraining):
        fxquant.compile(Disabled(), executor="eager")(torch.randn(5, 64, requires_grad=True))


def test_the_watch_warns_once() -> None:
    watch, weight = InferenceOnly(), nn.Parameter(torch.ones(2))
    with pytest.warns(ForgottenNoGradWarning, match="here: called in grad mode"):
        watch.check("here", [weight, 3, torch.ones(2)])
    watch.check("here", [weight * 2.0])
    with pytest.raises(GradientsNeedTraining, match="there"):
        watch.check("there", [weight * torch.ones(2, requires_grad=True)])
