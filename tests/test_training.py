"""Training through the compile door: operands are rounded in the graph, gradients are those of an eager reference."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import fxquant
from fxquant.errors import PathRulesNeedModel
from fxquant.spec import LinearSpec
from fxquant.weights import process_store
from tests.test_fallback import Broken, Disabled, Host

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # at the import of torch._inductor
    # Dynamo's own, where a graph begins with an activation that requires grad.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]

fx = torch.ops.fxquant
Model = Callable[..., Any]
INT4: dict[str, Any] = {"weights": "int4/group16", "activations": "int8", "training": True}
SPEC = LinearSpec.parse("w=int4/group16 x=int8/token")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def bare(model: nn.Module, executor: str = "eager", **options: Any) -> Model:
    return torch.compile(model, backend="fxquant", fullgraph=True, options={**INT4, "executor": executor, **options})


def with_model(model: nn.Module, **options: Any) -> Model:
    return fxquant.compile(model, executor="eager", **{**INT4, **options})


DOORS = pytest.mark.parametrize("compile_", [bare, with_model], ids=["bare", "model in hand"])


class RoundedLinear(nn.Linear):
    """The eager reference: what the door's two ops make of a linear."""

    spec = SPEC

    def forward(self, input: Tensor) -> Tensor:
        weight = fx.fake_quantize_weight(self.weight, str(self.spec.weights))
        x = input if self.spec.activations is None else fx.fake_quantize(input, str(self.spec.activations))
        return F.linear(x, weight, self.bias)


def rounded(model: nn.Module, except_for: tuple[str, ...] = ()) -> nn.Module:
    """A copy of the model with such linears, parameters and all."""
    twin = copy.deepcopy(model)
    for path, module in twin.named_modules():
        if type(module) is nn.Linear and path not in except_for:
            module.__class__ = RoundedLinear
    return twin


def step(run: Model, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and the gradients of a loss that weighs every element differently."""
    model.zero_grad()
    y = run(*inputs)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_trains_alike(run: Model, model: nn.Module, twin: nn.Module, *inputs: Tensor, atol: float = 0.0) -> None:
    y, gradients = step(run, model, *inputs)
    want, wanted = step(twin, twin, *inputs)
    torch.testing.assert_close(y, want, rtol=0, atol=atol)
    for name, gradient in wanted.items():
        assert gradient is not None
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class Net(nn.Module):
    """Normalization that writes to its buffers, a branch on the mode, three linears over one value, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(16)
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.head = nn.Linear(32, 16, bias=False)
        self.tied = nn.Linear(32, 16, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        h = torch.sigmoid(self.q(x)) * self.k(x) + self.v(x)
        y: Tensor = self.head(h) + self.tied(h * 0.5)
        return y * 2.0 if self.training else y


@DOORS
def test_gradients_are_those_of_the_two_ops_in_eager(compile_: Callable[..., Model]) -> None:
    model = Net()
    twin, run = rounded(model), compile_(model)
    packed = process_store().packed_count
    for x in (draw(8, 16), draw(8, 16) * 3):
        assert_trains_alike(run, model, twin, x)
    for mine, its in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, its)
    assert model.norm.num_batches_tracked == 2
    assert process_store().packed_count == packed


def test_inductor_trains_the_same() -> None:
    """Sums of up to 16 products of numbers below 8, in another order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    assert_trains_alike(bare(model, "inductor"), model, rounded(model), draw(8, 16), atol=16 * 16 * 8 * 2.0**-24)


@pytest.mark.slow
def test_inductor_trains_a_net_with_buffers_and_tied_weights() -> None:
    model = Net()
    assert_trains_alike(bare(model, "inductor"), model, rounded(model), draw(8, 16), atol=32 * 32 * 8 * 2.0**-24)


@DOORS
def test_the_mode_of_the_model_counts(compile_: Callable[..., Model]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(1.0), nn.BatchNorm1d(16), nn.Linear(16, 4))
    twin, run, x = rounded(model), compile_(model), draw(6, 16)
    assert_trains_alike(run, model.train(), twin.train(), x)
    assert torch.equal(model[0].weight.grad, torch.zeros(16, 16))  # pyright: ignore[reportArgumentType]
    assert_trains_alike(run, model.eval(), twin.eval(), x)
    with torch.no_grad():
        assert torch.equal(run(x), twin(x))


def test_a_training_run_compiles_once_and_inputs_get_gradients() -> None:
    model = Net()
    run, x = bare(model), draw(8, 16).requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    counters.clear()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (run(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert counters["stats"]["unique_graphs"] == 1
    twin = rounded(model)
    x.grad = None
    run(x).sum().backward()
    mine, x.grad = x.grad, None
    twin(x).sum().backward()
    assert mine is not None
    assert x.grad is not None
    assert torch.equal(mine, x.grad)


@pytest.mark.parametrize("dynamic", [True, None])
def test_sizes_stay_symbolic(dynamic: bool | None) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {**INT4, "executor": "eager"}
    run: Any = torch.compile(model, backend="fxquant", dynamic=dynamic, fullgraph=True, options=options)
    twin = rounded(model)
    counters.clear()
    for rows in (3, 7, 5, 11):
        assert_trains_alike(run, model, twin, draw(rows, 16))
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 16, padding_idx=2)
        self.conv = nn.Conv1d(16, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]

    def reference(self, ids: Tensor) -> Tensor:
        def weight(w: Tensor) -> Tensor:
            return fx.fake_quantize_weight(w, "int8/channel")

        x = F.embedding(ids, weight(self.table.weight), 2).transpose(1, 2)
        x = F.conv1d(fx.fake_quantize(x, "int8/sample"), weight(self.conv.weight), self.conv.bias, padding=1)
        x, a = x.transpose(1, 2), self.attention
        inner = fx.fake_quantize(x, "int8/token")
        q, k, v = (
            F.linear(inner, weight(w), b).unflatten(-1, (2, 4)).transpose(1, 2)
            for w, b in zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), strict=True)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(fx.fake_quantize(y, "int8/token"), weight(a.out_proj.weight), a.out_proj.bias)


def test_convolutions_tables_and_attention_are_trained() -> None:
    model = Convolving()
    twin = copy.deepcopy(model)
    run = bare(model, weights="int8", embeddings="int8")
    y, gradients = step(run, model, ids := torch.tensor([[1, 2, 3, 4], [5, 6, 2, 8]]))
    want, wanted = step(twin.reference, twin, ids)
    # A value on the edge between two codes may fall to the other one: a step is 1/127 of a row's range.
    torch.testing.assert_close(y, want, rtol=0, atol=float(want.abs().max()) / 127)
    assert wanted.keys() == gradients.keys()
    for name, gradient in wanted.items():
        assert gradient is not None
        got = gradients[name]
        assert got is not None
        assert (got - gradient).norm() <= gradient.norm() / 127, name
    assert not gradients["table.weight"][2].any()  # pyright: ignore[reportOptionalSubscript]


def test_autocast_rounds_the_parameters() -> None:
    model, x = nn.Linear(16, 8), draw(4, 16)
    run, twin = bare(model), rounded(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_trains_alike(run, model, twin, x)


@pytest.mark.parametrize("block", [Disabled, Broken])
def test_what_dynamo_never_shows_is_trained_too(block: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Host(block())
    view, twin = with_model(model), rounded(model)
    for x in (draw(5, 64), draw(5, 64) * 2):
        assert_trains_alike(view, model, twin, x)
    report = view.report()  # pyright: ignore[reportFunctionMemberAccess]
    assert report.coverage == 1.0
    if block is Disabled:
        (row,) = report.fallbacks
        assert (row.path, row.status) == ("block.proj", "fallback")
        assert "ran in eager on rounded operands" in row.reason


class Stack(nn.Module):
    """Equal blocks with a graph break: Dynamo makes one graph for all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Broken() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def test_a_rule_for_one_of_equal_blocks_is_honoured() -> None:
    model = Stack()
    view = with_model(model, rules={"blocks.1": None, "blocks.2.a": None})
    twin = rounded(model, ("blocks.1.a", "blocks.1.b", "blocks.2.a"))
    for x in (draw(5, 64), draw(5, 64) * 2):
        assert_trains_alike(view, model, twin, x)
    status = {site.path: site.status for site in view.report().sites}  # pyright: ignore[reportFunctionMemberAccess]
    assert (status["blocks.0.a"], status["blocks.1.a"]) == ("training", "skipped")


def test_each_of_the_graphs_of_equal_blocks_gets_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []

    def compile_fx(gm: torch.fx.GraphModule, _: Any, config_patches: Any = None, **_others: Any) -> Any:
        modes.append(config_patches)
        return gm

    monkeypatch.setattr(importlib.import_module("torch._inductor.compile_fx"), "compile_fx", compile_fx)
    mode = "max-autotune-no-cudagraphs"
    view = fxquant.compile(Stack(), **INT4, mode=mode, rules={"blocks.1": None, "blocks.2.a": None})
    view(draw(5, 64))
    assert len(modes) > len(view._backend._runners)  # some graph was compiled for a second set of specs
    assert all(patches and patches.get("max_autotune") for patches in modes)


def test_the_bare_door_refuses_such_rules() -> None:
    model = Stack()
    options: Any = {**INT4, "executor": "eager", "rules": {"*.a": None}}
    run = torch.compile(model, backend="fxquant", options=options)
    with pytest.raises(BackendCompilerFailed, match=PathRulesNeedModel.__name__):
        run(draw(5, 64))


@pytest.mark.parametrize("compile_", [bare, with_model])
def test_a_model_of_quantized_modules_is_compiled_as_it_is(compile_: Callable[..., Model]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    fxquant.quantize(model, weights="int4/group16", activations="int8", exclude="4")
    fxquant.quantize(model, weights="int8", include="2")
    twin = copy.deepcopy(model)
    run = compile_(model, weights=None, activations=None)
    assert_trains_alike(run, model, twin, draw(5, 16))
    if compile_ is with_model:
        rows = {s.path: (s.status, s.spec_text, s.reason) for s in run.report().sites}  # pyright: ignore[reportFunctionMemberAccess]
        trained = "quantized by the model door: trained as it is"
        assert rows["0"] == ("training", "w=int4/group16 x=int8/token", trained)
        assert rows["2"][0] == "training"
        assert rows["4"] == ("skipped", "", "left float by the model door")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_ops_train_whole_graphs_under_other_backends(backend: str) -> None:
    twin = rounded(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    compiled: Any = torch.compile(twin, backend=backend, fullgraph=True)
    other = copy.deepcopy(twin)
    assert_trains_alike(compiled, twin, other, draw(5, 16), atol=16 * 8 * 2.0**-24)


def test_aot_autograd_sees_parameters_as_dynamo_marked_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, examples: Any, mode: str | None, eager: bool) -> Any:
        given.append(gm)
        return gm.forward

    monkeypatch.setattr(sys.modules["fxquant.backend"], "to_training", keep)
    model = Net()
    assert_trains_alike(bare(model), model, rounded(model), draw(8, 16))
    marks = {}
    for node in given[0].graph.find_nodes(op="placeholder"):
        assert hasattr(node, "_dynamo_source")
        marks[node.name] = bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))
    assert marks.pop("l_x_") is False
    assert all(marks.values())
    assert "dynamo_compile_id" in given[0].meta


def test_nothing_keeps_the_model() -> None:
    model = Net()
    view = with_model(model)
    step(view, model, draw(8, 16))
    gone = weakref.ref(model), weakref.ref(model.head.weight)
    del model, view
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


class Digits:
    """scikit-learn's digits in two halves, and the network 64-16-16-10."""

    def __init__(self) -> None:
        data = pytest.importorskip("sklearn.datasets").load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        self.x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
        self.y = torch.tensor(data.target)[order]
        self.train, self.test = slice(0, 1400), slice(1400, None)

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
        return nn.Sequential(*layers)

    def fit(self, run: Model, model: nn.Module, steps: int, rate: float) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(run(self.x[self.train]), self.y[self.train])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def score(self, run: Model) -> tuple[float, float]:
        """Accuracy in percent and loss on what was not trained on."""
        logits, y = run(self.x[self.test]), self.y[self.test]
        return 100 * float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))


@pytest.mark.parametrize("weights", ["int4/channel", "int2/channel/affine"])
def test_training_regains_what_rounding_lost(weights: str) -> None:
    digits = Digits()
    model = digits.network()
    digits.fit(model, model, 150, 2e-2)
    exact, _ = digits.score(model)
    options: dict[str, Any] = {"weights": weights, "activations": "int8", "executor": "eager"}
    before, loss_before = digits.score(fxquant.compile(model, **options))
    view = fxquant.compile(model, **options, training=True, fullgraph=True)
    losses = digits.fit(view, model, 150, 1e-2)
    after, loss_after = digits.score(fxquant.compile(model, **options))  # what inference will run
    assert losses[-1] < losses[0]
    assert loss_after < loss_before
    assert after >= exact - 1.0 if weights == "int4/channel" else after - before >= 2 / 3 * (exact - before)
