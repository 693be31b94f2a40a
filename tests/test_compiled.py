"""fxquant.compile: the door that knows the model."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import FxQuantError, InvalidOption, NotAModule, PatternMatchesNothing, UnknownOption, UnknownPreset
from fxquant.weights import process_store
from tests.models import Decoder, sqnr
from tests.test_fallback import Disabled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """A repeated block with a graph break and a part that Dynamo never sees."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.c = nn.Sequential(nn.Linear(64, 64)) if whole else Disabled()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if not self.whole:
            torch._dynamo.graph_break()
        x = torch.relu(self.b(x))
        return x + self.c(x)


class Stack(nn.Module):
    def __init__(self, layers: int, *, whole: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(whole=whole) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(layers: int = 4) -> Stack:
    torch.manual_seed(0)
    return Stack(layers).eval()


def whole_like(model: Stack) -> Stack:
    """The same numbers as a model that Dynamo traces in one graph."""
    twin = Stack(len(model.layers), whole=True).eval()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data
    return twin


@torch.no_grad()
def test_a_break_in_a_repeated_block_costs_one_lowering_a_graph() -> None:
    model = stack(12)
    store = process_store()
    count = store.packed_count
    view = fxquant.compile(model, executor="eager")
    outputs = [view(X) for _ in range(3)]
    assert store.packed_count - count == 12 * 3
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert torch.equal(outputs[0], fxquant.compile(whole_like(model), executor="eager", fullgraph=True)(X))
    report = view.report()
    assert [len(graph.sites) for graph in report.graphs if graph.sites] == [1, 1]  # one graph for a, one for b
    assert report.coverage == 1.0


@torch.no_grad()
def test_a_rule_for_one_block_is_honoured() -> None:
    model = stack()
    rules: dict[str, Any] = {"layers.2.a": None, "layers.3": "int8wo", "layers.1.c": None}
    view = fxquant.compile(model, executor="eager", rules=rules)
    want = fxquant.compile(whole_like(model), executor="eager", rules=rules, fullgraph=True)
    assert torch.equal(view(X), want(X))
    status = {site.path: site.status for site in view.report().sites}
    assert status["layers.2.a"] == "skipped"
    everything = fxquant.compile(model, executor="eager", rules={"layers.0": None, "layers.*": None})
    assert torch.equal(everything(X), model(X))
    assert everything.report().coverage == 0.0


@torch.no_grad()
def test_one_float_block_among_quantized_ones() -> None:
    """The block that stays float computes exactly what the float module computes."""
    model = stack(3)
    view = fxquant.compile(model, executor="eager", rules={"layers.1": None})
    seen: dict[str, Tensor] = {}
    for name in ("0", "1"):
        layer: Any = model.layers[int(name)]
        layer.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output.clone()))
    view(X)
    block, before, after = model.layers[1], seen["0"], seen["1"].clone()
    assert torch.equal(block(before), after)


@torch.no_grad()
def test_options_come_as_they_are_or_as_a_config() -> None:
    model, ids = Decoder(layers=1).eval(), torch.arange(8)[None]
    by_name = fxquant.compile(model, "int8wo", executor="eager")(ids)
    by_config = fxquant.compile(model, fxquant.QuantConfig(preset="int8wo", executor="eager"))(ids)
    by_mapping = fxquant.compile(model, {"preset": "int8wo"}, executor="eager")(ids)
    assert torch.equal(by_name, by_config)
    assert torch.equal(by_name, by_mapping)


@pytest.mark.parametrize(
    ("error", "given"),
    [
        (UnknownOption, {"presett": "int8dq"}),
        (UnknownPreset, {"config": "int8dp"}),
        (InvalidOption, {"mode": "fast"}),
        (PatternMatchesNothing, {"rules": {"lm_haed": None}}),
    ],
)
def test_a_wrong_option_is_raised_as_it_is_at_once(error: type[FxQuantError], given: dict[str, Any]) -> None:
    with pytest.raises(error, match=r"lm_head|Known|it takes"):
        fxquant.compile(Decoder(layers=1), **given)


@torch.no_grad()
def test_the_view_is_like_the_model() -> None:
    model = stack(1)
    view = fxquant.compile(model, executor="eager")
    assert view.layers is model.layers
    assert [id(p) for p in view.parameters()] == [id(p) for p in model.parameters()]
    with pytest.raises(AttributeError, match="nothing"):
        _ = view.nothing


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


@torch.no_grad()
def test_what_is_set_on_the_view_is_set_on_the_model() -> None:
    model = Scaled()
    view = fxquant.compile(model, executor="eager")
    once = view(X)
    view.factor = 2.0
    assert model.factor == 2.0
    assert torch.equal(view(X), 2 * once)
    view.linear = nn.Linear(64, 4)
    assert model.linear is view.linear
    assert view(X).shape == (5, 4)
    del view.factor
    assert not hasattr(model, "factor")


def test_the_view_has_the_mode_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    view = fxquant.compile(model)
    assert view.training
    model.eval()
    assert not view.training
    assert view.train() is view
    assert model.training
    assert model[1].training


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copy_of_the_view_has_a_model_of_its_own(copied: Any) -> None:
    model = Scaled()
    view = fxquant.compile(model, executor="eager", rules={"linear": "int8wo"})
    want = view(X)
    twin = copied(view)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(X), want)
    assert [site.spec_text for site in twin.report().sites] == ["w=int8/channel"]


@torch.no_grad()
def test_inside_another_compile_its_backend_takes_the_model() -> None:
    model = Scaled()
    view = fxquant.compile(model, executor="eager")
    compiled = torch.compile(lambda x: view(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X) + 1)
    outer = fxquant.compile(nn.Sequential(view), executor="eager")
    assert torch.equal(outer(X), view(X))
    assert outer.report().coverage == 1.0


@torch.no_grad()
@pytest.mark.parametrize(
    "use", [lambda model: fxquant.compile(model, executor="eager")(X), lambda model: fxquant.explain(model, X)]
)
def test_a_model_that_nobody_has_is_freed_with_all_that_was_made_of_it(use: Any) -> None:
    gc.collect()
    resident = process_store().resident_bytes
    model = stack(1)
    use(model)
    assert process_store().resident_bytes > resident
    gone = weakref.ref(model), weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert process_store().resident_bytes == resident


@torch.no_grad()
def test_many_models_of_one_class_do_not_meet_a_limit() -> None:
    limit = torch._dynamo.config.recompile_limit
    models = [Scaled() for _ in range(limit + 2)]
    views = [fxquant.compile(model, executor="eager") for model in models]
    wants = [view(X) for view in views]
    assert [view.report().fallbacks for view in views] == [()] * len(views)
    assert [fxquant.explain(models[0], X).fallbacks for _ in range(limit + 2)] == [()] * len(views)
    assert all(torch.equal(view(X), want) for view, want in zip(views, wants, strict=True))


@pytest.mark.parametrize("door", [fxquant.compile, fxquant.explain])
def test_a_function_is_no_model(door: Any) -> None:
    with pytest.raises(NotAModule, match=r"this is 'stack', a function\. .* torch.compile\(f, backend='fxquant'"):
        door(stack)


@torch.no_grad()
def test_two_views_of_one_model_share_packed_weights() -> None:
    model = stack(2)
    store = process_store()
    fxquant.compile(model, executor="eager")(X)
    count, resident = store.packed_count, store.resident_bytes
    fxquant.compile(model, executor="eager")(X[:3])
    assert (store.packed_count, store.resident_bytes) == (count, resident)


@pytest.mark.parametrize("edit", [False, True], ids=["steady", "weights change"])
def test_two_threads_call_one_view(edit: bool) -> None:
    model = stack()
    with torch.no_grad():
        view = fxquant.compile(model, executor="eager")
        wants = {rows: view(X[:rows]) for rows in (5, 3)}
        if edit:
            for parameter in model.parameters():
                parameter.data.mul_(2.0)
            wants = {rows: fxquant.compile(whole_like(model), executor="eager")(X[:rows]) for rows in (5, 3)}
    wrong: list[str] = []
    start = threading.Barrier(2)

    def work(rows: int) -> None:
        start.wait()
        with torch.no_grad():
            wrong.extend(f"call {i}" for i in range(20) if not torch.equal(view(X[:rows]), wants[rows]))

    threads = [threading.Thread(target=work, args=(rows,)) for rows in wants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_make_the_first_call_together() -> None:
    model = stack(2)
    with torch.no_grad():
        want = fxquant.compile(whole_like(model), executor="eager")(X)
    torch._dynamo.reset()
    view = fxquant.compile(model, executor="eager")
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.append(view(X))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert all(torch.equal(y, want) for y in results)


@torch.no_grad()
def test_the_report_covers_the_whole_model() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    view = fxquant.compile(model, executor="eager", fullgraph=True)
    assert "nothing was captured yet" in view.report().uncovered[0].reason
    ids = torch.arange(8)[None]
    assert 38.0 < sqnr(view(ids), model(ids)) < 60.0
    report = view.report()
    assert [row.name for row in report.uncovered] == ["embed.weight"]
    matrices = [p.nbytes for p in model.parameters() if p.dim() >= 2]
    assert report.coverage == pytest.approx(1.0 - model.embed.weight.nbytes / sum(matrices), abs=1e-12)
    told = fxquant.explain(model, ids)
    assert (told.sites, told.uncovered, told.coverage) == (report.sites, report.uncovered, report.coverage)
