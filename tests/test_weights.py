"""Packed weights: packed once, never stale, gone with the model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import cpu_kernels
from fxquant.errors import NonFiniteWeight
from fxquant.weights import Recipe, Stamp, WeightStore, process_store

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))


class Small(nn.Module):
    """Two siblings that are joined, and a square linear behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 48)
        self.b = nn.Linear(64, 16)
        self.c = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(torch.cat([self.a(x), self.b(x)], dim=-1)))


class Hidden(Small):
    """The same, where Dynamo never sees it."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def bare(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, backend=fxquant.backend, options={"executor": "eager"})


def with_model(model: nn.Module) -> Callable[..., Tensor]:
    return fxquant.compile(model, executor="eager")


def _multiply(model: Small) -> None:
    with torch.no_grad():
        model.c.weight.mul_(1.5)


def _copy(model: Small) -> None:
    with torch.no_grad():
        model.a.weight.copy_(model.a.weight.flip(0))


def _load(model: Small) -> None:
    model.load_state_dict(Small().state_dict())


def _assign_state(model: Small) -> None:
    model.load_state_dict(Small().state_dict(), assign=True)


def _add_to_data(model: Small) -> None:
    model.c.weight.data += 1e-3


def _replace_data(model: Small) -> None:
    model.b.weight.data = torch.randn(16, 64)


def _turn_data(model: Small) -> None:
    model.c.weight.data = model.c.weight.data.t()  # the same memory, another layout


def _through_numpy(model: Small) -> None:
    values = model.a.weight.detach().numpy()
    values *= 1.5


def _merge_adapter(model: Small) -> None:
    model.a.weight.data += 0.01 * (torch.randn(48, 4) @ torch.randn(4, 64))


def _fused_step(optimizer: type[torch.optim.Optimizer]) -> Callable[[Small], None]:
    def step(model: Small) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters(), lr=0.1, fused=True).step()  # pyright: ignore[reportCallIssue]
        model.zero_grad()

    return step


def _new_parameter(model: Small) -> None:
    model.a.weight = nn.Parameter(torch.randn(48, 64))


def _new_module(model: Small) -> None:
    model.c = nn.Linear(64, 64)


def _other_type(model: Small) -> None:
    model.c = nn.Linear(64, 32, bias=False)


def _change_bias(model: Small) -> None:
    model.a.bias.data += 1.0  # joined with the sibling's, so it is folded too


EDITS: dict[str, Callable[[Small], None]] = {
    "mul_": _multiply,
    "copy_": _copy,
    "load_state_dict": _load,
    "load_state_dict assign": _assign_state,
    "data +=": _add_to_data,
    "data =": _replace_data,
    "data = transposed": _turn_data,
    "numpy": _through_numpy,
    "adapter merge": _merge_adapter,
    "fused SGD": _fused_step(torch.optim.SGD),
    "fused AdamW": _fused_step(torch.optim.AdamW),
    "new Parameter": _new_parameter,
    "new module": _new_module,
    "other module": _other_type,
    "bias": _change_bias,
}
DOORS = {"backend": (bare, Small), "compile": (with_model, Small), "in eager": (with_model, Hidden)}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("door", DOORS)
def test_a_changed_weight_gives_the_new_answer(door: str, edit: str) -> None:
    compile_, kind = DOORS[door]
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        compiled = compile_(model)
        before = compiled(X)
        assert torch.equal(compiled(X), before)
    EDITS[edit](model)
    with torch.no_grad():
        after = compiled(X)
        want = with_model(copy.deepcopy(model))(X)
    assert torch.equal(after, want)
    assert after.shape != before.shape or not torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_can_be_merged_and_unmerged(door: str) -> None:
    compile_, kind = DOORS[door]
    torch.manual_seed(0)
    model = kind()
    delta = torch.randint(-8, 9, (48, 64)) / 64.0
    model.a.weight.data = torch.randint(-64, 65, (48, 64)) / 64.0  # so that sums are exact
    with torch.no_grad():
        compiled = compile_(model)
        before = compiled(X)
        model.a.weight.data += delta
        assert not torch.equal(compiled(X), before)
        model.a.weight.data -= delta
        assert torch.equal(compiled(X), before)


@pytest.mark.parametrize("door", DOORS)
def test_refresh_repacks_what_no_cheap_check_sees(door: str) -> None:
    compile_, kind = DOORS[door]
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        compiled = compile_(model)
        before = compiled(X)
        model.c.weight.data[3, 5] += 10.0
        fxquant.refresh(model)
        after = compiled(X)
        want = with_model(copy.deepcopy(model))(X)
    assert not torch.equal(after, before)
    assert torch.equal(after, want)


def test_parameters_made_in_inference_mode_have_no_version() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        model = Small()
        compiled = with_model(model)
        compiled(X)
        model.a.weight.mul_(2.0)
        model.c.bias.add_(1.0)
        assert torch.equal(compiled(X), with_model(copy.deepcopy(model))(X))


def test_a_change_to_nan_is_an_error_at_every_call() -> None:
    """After the first error the packed form of the old weight must not come back."""
    model = Small()
    with torch.no_grad():
        compiled = with_model(model)
        compiled(X)
        model.c.weight.mul_(float("nan"))
        for _ in range(3):
            with pytest.raises(NonFiniteWeight, match=r"'c'.*4096 non-finite"):
                compiled(X)
        model.c.weight.fill_(1.0)
        assert torch.equal(compiled(X), with_model(copy.deepcopy(model))(X))


def test_each_weight_is_packed_once_for_all_shapes_and_calls() -> None:
    store, model = process_store(), Small()
    count = store.packed_count
    with torch.no_grad():
        compiled = bare(model)
        compiled(X)
        # a and b are joined: codes, and the bias put together; then the codes of c.
        assert store.packed_count - count == 3
        for rows in (1, 2, 7, 5):
            compiled(X[:rows])  # a static shape, then dynamic ones: several graphs
        compiled(X[None])
        with_model(model)(X)
    assert store.packed_count - count == 3


@pytest.mark.parametrize("door", DOORS)
def test_packed_weights_go_with_the_model(door: str) -> None:
    compile_, kind = DOORS[door]
    gc.collect()
    store = process_store()
    before = store.resident_bytes
    model = kind()
    with torch.no_grad():
        compiled = compile_(model)
        compiled(X)
    assert store.resident_bytes > before
    watched = [weakref.ref(p) for p in model.parameters()]
    del model, compiled
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert store.resident_bytes == before


def test_a_replaced_weight_goes_although_the_model_stays() -> None:
    store, model = process_store(), Small()
    with torch.no_grad():
        compiled = with_model(model)
        compiled(X)
        resident, old = store.resident_bytes, weakref.ref(model.c.weight)
        model.c.weight = nn.Parameter(torch.randn(64, 64))
        compiled(X)
        gc.collect()
        assert old() is None
        assert store.resident_bytes == resident


def test_dynamo_keeps_no_parameters_alive_through_the_runner() -> None:
    model = Small()
    with torch.no_grad():
        bare(model)(X)
    watched = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)  # without a reset of Dynamo


# ---- the store and the stamp by themselves


def _doubling(key: str = "double") -> Recipe:
    return Recipe(key, lambda w: (w * 2,), lambda tensors: tensors)


def test_the_store_shares_by_recipe_and_parameters() -> None:
    store, w = WeightStore(), nn.Parameter(torch.randn(4, 4))
    one = store.entry(_doubling(), [w])
    assert store.entry(_doubling(), [w]) is one
    assert store.entry(_doubling("other"), [w]) is not one
    assert (store.packed_count, store.resident_bytes) == (2, 128)


def test_the_store_packs_again_where_only_the_layout_changed() -> None:
    store, w = WeightStore(), nn.Parameter(torch.randn(8, 8))
    store.entry(_doubling(), [w])
    w.data = w.data.t()
    assert torch.equal(store.entry(_doubling(), [w]).tensors[0], w * 2)
    w.data = w.data[:4]
    assert torch.equal(store.entry(_doubling(), [w]).tensors[0], w * 2)


def test_forget_drops_what_was_made_from_a_parameter() -> None:
    store, w, other = WeightStore(), nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    store.entry(_doubling(), [w])
    store.entry(_doubling(), [other])
    generation = store.generation
    assert store.forget([w]) == 1
    assert store.generation > generation
    assert store.resident_bytes == 64


@pytest.mark.parametrize("compiler", [True, False], ids=["library", "without"])
@pytest.mark.parametrize("shape", [(1,), (3,), (64,), (33, 65), ()], ids=str)
def test_a_stamp_sees_edits_of_a_whole_tensor(
    shape: tuple[int, ...], compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    w, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    stamp = Stamp([w, other])
    assert stamp.is_fresh([w, other])
    other.data += 1e-3
    assert not stamp.is_fresh([w, other])
    assert Stamp([w, other]).is_fresh([w, other])


def test_a_stamp_takes_empty_tensors_and_gaps() -> None:
    base = torch.zeros(8, 8)
    tensors = [torch.empty(0, 4), base[:, ::2], torch.zeros(2, dtype=torch.float8_e4m3fn)]
    stamp = Stamp(tensors)
    assert stamp.is_fresh(tensors)
    base.data.add_(1.0)
    assert not stamp.is_fresh(tensors)
