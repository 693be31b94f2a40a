"""What Dynamo never sees: quantized in eager, from the first call, without touching the user's modules."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.weights import process_store
from tests.models import sqnr

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


X = tokens(5, 64)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Disabled(Plain):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # the line that the report names


class Host(nn.Module):
    """A linear, a block of some kind, and a linear."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.block = block
        self.last = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.block(self.first(x))))


class Branching(nn.Module):
    """Control flow on data: a graph break whose branch Dynamo compiles on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.yes = nn.Linear(64, 64)
        self.no = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.yes(x) if x.sum() > 0 else self.no(x)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


def host(block: nn.Module) -> Host:
    torch.manual_seed(0)
    return Host(block).eval()


def view_of(model: nn.Module, **fields: Any) -> fxquant.CompiledModel:
    return fxquant.compile(model, executor="eager", **fields)


def as_seen(model: nn.Module) -> dict[str, Any]:
    """Everything that must stay as it is: types, attributes by identity, children, state."""
    return {
        path: (type(module), {name: id(value) for name, value in module.__dict__.items() if name != "training"})
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("block", [Disabled, Branching, Broken], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_first_and_second_call_agree_and_the_model_stays(block: type[nn.Module]) -> None:
    model = host(block())
    want, seen = model(X), as_seen(model)
    view = view_of(model)
    first, second = view(X), view(X)
    assert torch.equal(first, second)
    assert 35.0 < sqnr(first, want) < 70.0  # quantized from the first call on, all of it
    assert as_seen(model) == seen
    assert torch.equal(model(X), want)
    assert view.report().coverage == (1.0 if block is not Branching else 0.75)


@torch.no_grad()
def test_eager_and_graph_give_the_same_bits() -> None:
    model = host(Disabled())
    twin = host(Plain())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(view_of(model)(X), view_of(twin, fullgraph=True)(X))


@torch.no_grad()
def test_both_branches_are_quantized() -> None:
    model = host(Branching())
    view = view_of(model)
    for sign in (1, -1):
        model.first.bias.fill_(sign * 10.0)
        assert 35.0 < sqnr(view(X), model(X)) < 70.0
    assert view.report().coverage == 1.0


@torch.no_grad()
def test_the_report_names_each_with_reason_and_line() -> None:
    view = view_of(host(Disabled()))
    view(X)
    report = view.report()
    (row,) = report.fallbacks
    lines, start = inspect.getsourcelines(Disabled)
    line = start + next(i for i, text in enumerate(lines) if "the report names" in text)
    assert (row.path, row.status) == ("block.proj", "fallback")
    assert f"torch.compiler.disable at test_fallback.py:{line}" in row.reason
    assert row.reason.endswith("; ran in eager on the quantized op")
    assert row.reason in str(report)
    broken = view_of(host(Broken()))
    broken(X)
    text = str(broken.report())
    place = inspect.getsourcelines(Broken.forward)[1] + 2
    assert f"test_fallback.py:{place}" in text
    assert not broken.report().fallbacks


@torch.no_grad()
def test_explain_says_the_same_and_compiles_nothing() -> None:
    model = host(Disabled())
    report = fxquant.explain(model, X)
    (row,) = report.fallbacks
    assert "torch.compiler.disable" in row.reason
    assert report.coverage == 1.0


@torch.no_grad()
def test_rules_hold_in_eager() -> None:
    model = host(Disabled())
    view = view_of(model, rules={"block.proj": None, "first": None, "last": None})
    assert torch.equal(view(X), model(X))
    (row,) = view.report().fallbacks
    assert row.status == "skipped"
    assert row.reason.endswith('; rule "block.proj=none"')
    assert "quantized op" not in row.reason
    int8wo = view_of(model, rules={"block": "int8wo"})
    int8wo(X)
    assert int8wo.report().fallbacks[0].spec_text == "w=int8/channel"


class Scaled(nn.Linear):
    """A linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.0


class Renamed(nn.Linear):
    """A linear by another name."""


class Wrapping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@torch.no_grad()
def test_a_linear_with_a_forward_of_its_own_is_left_alone_and_named() -> None:
    torch.manual_seed(0)
    model = Wrapping(Scaled(64, 64))
    view = view_of(model)
    assert torch.equal(view(X), model(X))
    (row,) = view.report().fallbacks
    assert (row.path, row.status) == ("inner", "declined")
    assert "Scaled has a forward of its own" in row.reason
    assert view.report().coverage == 0.0


@torch.no_grad()
def test_a_linear_with_a_forward_of_its_own_is_quantized_in_a_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(64, 64))
    view = view_of(model)
    assert 35.0 < sqnr(view(X), model(X)) < 70.0
    report = view.report()
    assert (report.coverage, report.fallbacks) == (1.0, ())


@torch.no_grad()
def test_a_parametrized_linear_in_a_graph_has_one_row() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    view = view_of(model)
    view(X)
    report = view.report()
    assert (report.coverage, report.fallbacks) == (1.0, ())
    assert [site.path for site in report.sites] == ["0"]


@torch.no_grad()
def test_a_lazy_linear_becomes_one_at_the_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64))
    view = view_of(model)
    out = view(X)
    assert 35.0 < sqnr(out, model(X)) < 70.0
    assert torch.equal(view(X), out)
    assert view.report().coverage == 1.0


@torch.no_grad()
def test_a_subclass_that_computes_the_same_is_a_linear() -> None:
    torch.manual_seed(0)
    model = Wrapping(Renamed(64, 64))
    view = view_of(model)
    assert 35.0 < sqnr(view(X), model(X)) < 70.0
    assert view.report().coverage == 1.0


def hidden(module: nn.Module) -> Wrapping:
    torch.manual_seed(0)
    return Wrapping(module).eval()


IMAGES = tokens(2, 4, 9, 8)
IDS = torch.tensor([[1, 0, 7], [9, 9, 2]])
HIDDEN: dict[str, tuple[Any, Tensor]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGES),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), IMAGES),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=4), IMAGES),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGES),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), IMAGES),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), IMAGES[0]),
    "one axis": (lambda: nn.Conv1d(4, 6, 3), IMAGES[..., 0]),
    "three axes": (lambda: nn.Conv3d(4, 6, 2), IMAGES[..., None].expand(-1, -1, -1, -1, 3)),
    "embedding": (lambda: nn.Embedding(10, 64, padding_idx=0), IDS),
}


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("preset", ["int8dq", "int4wo-g32"])
@torch.no_grad()
def test_every_product_runs_quantized_in_eager_as_in_a_graph(case: str, preset: str) -> None:
    make, x = HIDDEN[case]
    model, options = hidden(make()), {"config": preset, "embeddings": "int8"}
    view = view_of(model, **options)
    first = view(x)
    assert torch.equal(view(x), first)
    assert 10.0 < sqnr(first, model(x)) < 70.0
    (row,) = view.report().fallbacks
    assert (row.path, row.status) == ("inner", "fallback")
    assert view.report().coverage == 1.0
    seen = nn.Sequential(model.inner)
    assert torch.equal(view_of(seen, fullgraph=True, **options)(x), first)


@torch.no_grad()
def test_an_embedding_in_eager_stays_float_unless_asked() -> None:
    model = hidden(nn.Embedding(10, 64))
    view = view_of(model)
    assert torch.equal(view(IDS), model(IDS))
    (row,) = view.report().fallbacks
    assert (row.path, row.status, row.op) == ("inner", "skipped", "embedding")


@torch.no_grad()
def test_an_embedding_with_max_norm_does_in_eager_what_it_does() -> None:
    model = hidden(nn.Embedding(10, 64, max_norm=0.5))
    twin = copy.deepcopy(model)
    view = view_of(model, embeddings="int8")
    assert torch.equal(view(IDS), twin(IDS))
    assert torch.equal(model.inner.weight, twin.inner.weight)  # pyright: ignore[reportArgumentType]
    (row,) = view.report().fallbacks
    assert row.status == "declined"


@torch.no_grad()
def test_the_fields_of_a_convolution_are_read_at_each_call() -> None:
    convolution = nn.Conv2d(4, 6, 3, padding=1)
    model = hidden(convolution)
    view = view_of(model)
    assert view(IMAGES).shape == (2, 6, 9, 8)
    convolution.stride = (2, 2)
    assert view(IMAGES).shape == (2, 6, 5, 4)
    assert 30.0 < sqnr(view(IMAGES), model(IMAGES)) < 70.0
    assert view(IMAGES[0]).shape == (6, 5, 4)


class Standardized(nn.Conv2d):
    """A convolution that computes something else, behind torch's own forward."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2.0, bias)


@torch.no_grad()
def test_a_convolution_with_a_method_of_its_own_is_left_alone_and_named() -> None:
    model = hidden(Standardized(4, 6, 3))
    view = view_of(model)
    assert torch.equal(view(IMAGES), model(IMAGES))
    (row,) = view.report().fallbacks
    assert (row.path, row.status) == ("inner", "declined")
    assert "Standardized has a forward of its own" in row.reason


class Mode(nn.Module):
    """Tells its training flag and its plain attribute through its output."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.offset = 0.0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.proj(x) + self.offset
        return y + 100.0 if self.training else y


class HiddenMode(Mode):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Mode, HiddenMode])
@torch.no_grad()
def test_what_the_user_sets_on_the_model_counts(kind: type[Mode]) -> None:
    model = nn.Sequential(kind(), nn.Dropout(1.0)).eval()
    block: Any = model[0]
    view, x = view_of(model), tokens(2, 8)
    base = view(x)
    block.train()
    assert torch.equal(view(x), base + 100.0)
    model.train()
    assert torch.equal(view(x), torch.zeros_like(base))
    view.eval()
    assert not model.training
    assert not block.training
    block.offset = 3.0
    assert torch.equal(view(x), base + 3.0)
    assert block.calls == 4  # what the model writes to itself is seen on the model
    block.calls = 0
    view(x)
    assert block.calls == 1


@pytest.mark.parametrize("where", ["proj", ""])
@torch.no_grad()
def test_hooks_on_the_users_modules_run(where: str) -> None:
    model = Mode().eval()
    view, x = view_of(model), tokens(2, 8)
    base = view(x)

    def add_one(module: nn.Module, args: Any, output: Any) -> Any:
        return output + 1.0

    handle = model.get_submodule(where).register_forward_hook(add_one)
    assert torch.equal(view(x), base + 1.0)
    handle.remove()
    assert torch.equal(view(x), base)


class Buffered(Mode):
    def __init__(self) -> None:
        super().__init__()
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


@torch.no_grad()
def test_buffers_are_the_users() -> None:
    model = Buffered().eval()
    view, x = view_of(model), tokens(2, 8)
    base = view(x)
    model.shift.fill_(2.0)
    assert torch.equal(view(x), base + 2.0)
    model.shift = torch.full((8,), 5.0)
    assert torch.equal(view(x), base + 5.0)


@torch.no_grad()
def test_batch_norm_updates_the_users_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 64)).train()
    twin = copy.deepcopy(model)
    view = view_of(model)
    for _ in range(2):
        view(X)
        twin(X)
    assert torch.equal(model[0].num_batches_tracked, torch.tensor(2))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(model[0].running_mean, twin[0].running_mean, rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.shared = nn.Linear(64, 64)
        self.again = self.shared
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(torch.relu(self.shared(self.embed(ids)))))


class HiddenTied(Tied):
    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)


@torch.no_grad()
def test_shared_modules_and_tied_weights_are_one() -> None:
    torch.manual_seed(0)
    model = HiddenTied().eval()
    view, ids = view_of(model), torch.arange(6)[None]
    count = process_store().packed_count
    hidden = view(ids)
    assert process_store().packed_count - count == 2
    assert 30.0 < sqnr(hidden, model(ids)) < 70.0
    seen = Tied().eval()
    seen.load_state_dict(model.state_dict())
    assert torch.equal(hidden, view_of(seen)(ids))
    # The name under which a shared module has a rule counts, whichever of its names that is.
    ruled = view_of(model, rules={"again": None, "head": None})
    assert torch.equal(ruled(ids), model(ids))


@torch.no_grad()
def test_copies_and_pickles_of_the_model_are_plain() -> None:
    model = host(Disabled())
    keys = list(model.state_dict())
    view = view_of(model)
    view(X)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(m) for m in twin.modules()} == {Host, nn.Linear, Disabled}
        assert torch.equal(twin(X), model(X))


@torch.no_grad()
def test_replaced_and_added_modules_are_taken_over() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model = Wrapping(inner).eval()
    view = view_of(model)
    view(X)
    inner.append(nn.Linear(64, 64))
    inner[0] = nn.Linear(64, 64)
    assert torch.equal(view(X), view_of(model)(X))
    assert view.report().coverage == 1.0
    model.inner = nn.Linear(64, 32)
    assert torch.equal(view(X), view_of(model)(X))


@torch.no_grad()
def test_a_graph_module_of_the_users_is_served() -> None:
    model = torch.fx.symbolic_trace(host(Plain()))
    assert 35.0 < sqnr(view_of(model)(X), model(X)) < 70.0


@torch.no_grad()
def test_modules_without_linears_are_the_users_own() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.ReLU(), nn.LayerNorm(64)))
    kept: list[nn.Module] = []
    model[1].register_forward_hook(lambda module, args, output: kept.append(module))
    torch.compiler.disable(model[1])  # the hook sees whatever module runs
    view_of(model)(X)
    assert kept == [model[1]]


def test_a_scripted_part_runs_as_it_is() -> None:
    class Adding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1.0

    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(Adding())
    model = nn.Sequential(nn.Linear(64, 64), scripted).eval()
    with torch.no_grad():
        assert 35.0 < sqnr(view_of(model)(X) - 1.0, model(X) - 1.0) < 70.0
