"""fxquant.compile(freezing=True): a model that nobody changes any more."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

import fxquant
from fxquant.errors import ForgottenNoGradWarning, InvalidOption
from tests.models import Decoder

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # at the import of torch._inductor
]

SHIFT = 0.0
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))


class Stepper(nn.Module):
    """Reads a parameter, a buffer, a tensor that hangs on it, and a memory that it is given, which it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("offset", torch.linspace(-1, 1, 64))
        self.own = [torch.zeros(64)]
        self.twice = False

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.linear(x) + self.offset + memory + SHIFT
        memory.add_(1)
        self.own[0].add_(1)
        return 2 * y + self.own[0] if self.twice else y + self.own[0]


def stepper() -> Stepper:
    torch.manual_seed(0)
    return Stepper().eval()


@pytest.mark.parametrize("executor", ["eager", "inductor"])
@torch.no_grad()
def test_the_bits_are_those_without(executor: str) -> None:
    outputs = []
    for freezing in (False, True):
        model = stepper()
        fast = fxquant.compile(model, "int8dq", executor=executor, freezing=freezing)
        memory = torch.zeros(64)
        outputs.append(torch.stack([fast(X, memory) for _ in range(3)]))
        assert memory.eq(3).all()  # inputs and the model's own tensors are written to
        assert model.own[0].eq(3).all()
    assert torch.equal(*outputs)


@torch.no_grad()
def test_nothing_looks_at_the_model_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stepper()
    fast = fxquant.compile(model, "int8dq", executor="eager", freezing=True)
    memory = torch.zeros(64)
    before = fast(X, memory) - memory - model.own[0]
    model.linear.weight.mul_(2)
    model.linear.weight = nn.Parameter(torch.zeros(64, 64))
    model.twice = True
    monkeypatch.setitem(globals(), "SHIFT", 100.0)
    after = fast(X, memory) - memory - model.own[0]
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_inputs_are_looked_at() -> None:
    fast = fxquant.compile(stepper(), "int8dq", executor="eager", freezing=True)
    other = torch.full((64,), 7.0)
    first = fast(X, torch.zeros(64))
    torch.testing.assert_close(fast(X, other), first + 8)  # another memory, and the model's own has counted on
    assert fast(torch.zeros(3, 64), other).shape == (3, 64)


@torch.no_grad()
def test_autocast_is_looked_at() -> None:
    outputs = []
    for freezing in (False, True):
        fast = fxquant.compile(stepper(), "int8dq", executor="eager", freezing=freezing)
        fast(X, torch.zeros(64))
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(fast(X, torch.zeros(64)))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[1], fast(X, torch.zeros(64)) - 1), "autocast rounds x here"


@torch.no_grad()
def test_a_model_with_quantized_modules_and_tied_weights() -> None:
    model = Decoder(layers=1).eval()
    ids = torch.arange(6)[None]
    plain = fxquant.compile(model, "int4wo", executor="eager")(ids)
    assert torch.equal(fxquant.compile(model, "int4wo", executor="eager", freezing=True)(ids), plain)
    fxquant.quantize(model, "int8dq")
    fxquant.freeze(model)
    fast = fxquant.compile(model, executor="eager", freezing=True)
    assert torch.equal(fast(ids), fxquant.compile(model, executor="eager")(ids))
    assert fast.report().sites


@torch.no_grad()
def test_it_has_to_be_one_graph() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.linear(x)

    with pytest.raises(Unsupported, match="graph_break"):
        fxquant.compile(Broken(), freezing=True)(torch.randn(2, 8))


def test_no_training() -> None:
    with pytest.raises(InvalidOption, match=r"freezing.*training"):
        fxquant.compile(stepper(), training=True, freezing=True)


def test_a_forgotten_no_grad_is_told() -> None:
    fast = fxquant.compile(stepper(), "int8dq", executor="eager", freezing=True)
    with pytest.warns(ForgottenNoGradWarning):
        out = fast(X, torch.zeros(64))
    assert not out.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(X, torch.zeros(64))


@torch.no_grad()
def test_weights_live_as_long_as_model_or_compiled_one() -> None:
    model = stepper()
    fast = fxquant.compile(model, "int8dq", executor="eager", freezing=True)
    fast(X, torch.zeros(64))
    weight = weakref.ref(model.linear.weight)
    del model
    gc.collect()
    assert weight() is not None
    fast(X, torch.zeros(64))
    del fast
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_a_pickle_freezes_too() -> None:
    fast = fxquant.compile(nn.Sequential(nn.Linear(64, 64)).eval(), "int8dq", executor="eager", freezing=True)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(X), fast(X))
    again._orig_mod[0].weight.zero_()
    assert torch.equal(again(X), fast(X))
