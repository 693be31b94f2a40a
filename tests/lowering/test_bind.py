"""bind: weights become inputs, packed ones in the place of float ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import cpu_kernels
from fxquant.annotation import note_of
from fxquant.errors import NonFiniteWeight
from fxquant.folding import folded_constants
from fxquant.graphs import value_of
from fxquant.lowering import Original, Packed, bind
from fxquant.spec import PRESETS, QuantConfig
from fxquant.weights import WeightStore
from tests.lowering.helpers import bound, call_bound, selected
from tests.passes.helpers import Linears, X, run

fx = torch.ops.fxquant


class Mixed(nn.Module):
    """A joined pair, a linear that stays float, a float norm, a buffer; the parameters do not come in this order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
        self.last = nn.Linear(8, 4)
        self.register_buffer("shift", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.last(F.silu(self.a(x)) * self.b(x) + self.shift)


MIXED = QuantConfig("int8dq", rules={"last": None})


def words(captured: Any, binding: Any) -> dict[str, str]:
    """Placeholder → what it takes, in words."""
    names = {w.position: w.paths[0] for w in captured.weights}
    said = {}
    for node, taken in zip(captured.gm.graph.find_nodes(op="placeholder"), binding.arguments, strict=True):
        if isinstance(taken, Packed):
            recipe = binding.recipes[taken.recipe]
            said[node.target] = f"{taken.output} of {'+'.join(names[p] for p in recipe.sources)}"
        else:
            said[node.target] = names.get(taken.position, "input")
    return said


def test_every_placeholder_is_an_argument_or_comes_from_a_recipe() -> None:
    captured, binding, _ = bound(Mixed(), X, config=MIXED)
    assert words(captured, binding) == {
        "L_x_": "input",
        "a_b_packed": "0 of a.weight+b.weight",
        "a_b_scale": "1 of a.weight+b.weight",
        "a_b_bias": "0 of a.bias+b.bias",
        "norm_weight": "norm.weight",
        "norm_bias": "norm.bias",
        "shift": "shift",
        "last_weight": "last.weight",
        "last_bias": "last.bias",
    }
    assert [r.recipe.where for r in binding.recipes] == [("a", "b"), ("a", "b")]
    assert [r.recipe.quantizes for r in binding.recipes] == [False, True]  # the bias first, as the graph reads them
    assert not captured.gm.graph.find_nodes(op="get_attr")
    assert not list(captured.gm.parameters())
    assert not list(captured.gm.buffers())


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("fuse", [True, False])
def test_the_bound_graph_computes_what_the_unbound_one_does(preset: str, fuse: bool) -> None:
    cpu_kernels.load()  # else the first of the two would be the reference's
    config = QuantConfig(preset, fuse=fuse)
    wanted = run(selected(Mixed(), X, config=config).gm, [X])
    captured, binding, args = bound(Mixed(), X, config=config)
    torch.testing.assert_close(call_bound(captured.gm, binding, args), wanted, rtol=0, atol=0)


def test_without_evaluation_the_store_makes_the_same_tensors() -> None:
    captured, binding, args = bound(Mixed(), X, config=MIXED)
    plain, plain_binding, _ = bound(Mixed(), X, config=MIXED, evaluate=False)
    assert [r.folded is None for r in binding.recipes] == [False, False]
    assert [r.folded is None for r in plain_binding.recipes] == [True, True]
    assert [r.recipe for r in binding.recipes] == [r.recipe for r in plain_binding.recipes]
    got, wanted = call_bound(plain.gm, plain_binding, args), call_bound(captured.gm, binding, args)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_one_store_entry_serves_a_static_and_a_dynamic_graph() -> None:
    model, store = Mixed(), WeightStore()
    for options in ({}, {"dynamic": True}):
        captured, binding, _ = bound(model, X, config=MIXED) if not options else bound_dynamic(model)
        positions = {w.position: getattr_of(model, w.paths[0]) for w in captured.weights}
        for recipe in binding.recipes:
            store.entry(recipe.recipe, [positions[p] for p in recipe.sources])
    assert store.packed_count == 2  # the joined weight and the joined bias


def bound_dynamic(model: nn.Module) -> Any:
    from fxquant.lowering import bind

    captured = selected(model, X, config=MIXED, dynamic=True)
    return captured, bind(captured.gm, captured), None


def getattr_of(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def test_tied_weights_are_packed_once() -> None:
    captured, binding, _ = bound(Linears(lambda m, x: m.a(x) + m.a(torch.relu(x))), X)
    assert len(binding.recipes) == 1
    assert list(words(captured, binding)) == ["L_x_", "a_packed", "a_scale"]


def test_codes_read_by_a_kernel_and_by_the_reference_come_in_both_forms() -> None:
    """Under autocast the weight-only kernel of int8 refuses, so a tied weight is packed for two kernels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = m.a(x)
        return y + m.a(torch.relu(x))

    captured, binding, args = bound(Linears(forward), X, config="int8wo")
    assert words(captured, binding) == {
        "L_x_": "input",
        "a_packed": "0 of a.weight",
        "a__packed": "1 of a.weight",
        "a_scale": "2 of a.weight",
        "a_scale_": "3 of a.weight",
    }
    wanted = run(selected(Linears(forward), X, config="int8wo").gm, [X])
    torch.testing.assert_close(call_bound(captured.gm, binding, args), wanted, rtol=0, atol=0)


def test_placeholders_of_packed_weights_belong_to_their_site() -> None:
    captured, _, _ = bound(Linears(lambda m, x: m.a(x) * m.b(x)), X)
    placeholders = {n.target: n for n in captured.gm.graph.find_nodes(op="placeholder")}
    for name in ("a_b_packed", "a_b_scale"):
        assert note_of(placeholders[name]).paths == ("a", "b")
    assert tuple(value_of(placeholders["a_b_packed"]).shape) == (16 * 16,)


def test_marks_of_dynamo_travel_with_the_weights_that_stay() -> None:
    captured, binding, _ = bound(Mixed(), X, config=MIXED)
    marks = {w.paths[0]: w.input_meta.get("tensor_dict") for w in captured.weights}
    assert marks["shift"]
    for node, taken in zip(captured.gm.graph.find_nodes(op="placeholder"), binding.arguments, strict=True):
        weight = next((w for w in captured.weights if taken == Original(w.position)), None)
        if weight is not None:
            assert node.meta.get("tensor_dict") == marks[weight.paths[0]]
            assert value_of(node).shape == getattr_of(Mixed(), weight.paths[0]).shape


def test_a_graph_without_inputs_or_weights_binds() -> None:
    captured, binding, args = bound(lambda x: x + 1, X)
    assert binding.arguments == (Original(0),)
    assert call_bound(captured.gm, binding, args)[0].shape == X.shape
    assert bound(Linears(lambda m, x: x + m.table.sum()), X)[1].recipes == ()


def test_a_graph_of_its_own_inside_stays_where_it_is() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (m.a(x),))

    captured, binding, args = bound(Linears(forward), X)
    held = [str(n.target) for n in captured.gm.graph.find_nodes(op="get_attr")]
    assert len(held) == 2
    assert all(isinstance(getattr(captured.gm, name), torch.fx.GraphModule) for name in held)
    wanted = run(selected(Linears(forward), X).gm, [X])
    torch.testing.assert_close(call_bound(captured.gm, binding, args), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_weight_that_is_not_finite_is_refused_by_name(preset: str) -> None:
    """The one of several joined ones that it is."""
    _, binding, args = bound(Linears(lambda m, x: m.a(x) * m.b(x)), X, config=preset, evaluate=False)
    (recipe,) = binding.recipes
    parameters = [args[p].detach().clone() for p in recipe.sources]
    parameters[1][3, 5] = float("nan")
    with pytest.raises(NonFiniteWeight, match=r"weight 'b' holds 1 non-finite value, the first at \[3, 5\]"):
        WeightStore().entry(recipe.recipe, parameters)


def test_a_joined_bias_may_be_infinite() -> None:
    _, binding, args = bound(Linears(lambda m, x: m.a(x) * m.b(x), bias=True), X, evaluate=False)
    (bias,) = (r for r in binding.recipes if not r.recipe.quantizes)
    parameters = [args[p].detach().clone() for p in bias.sources]
    parameters[0][2] = float("inf")
    assert WeightStore().entry(bias.recipe, parameters).tensors[0][2] == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_folded_to_the_codes_of_quantize_weight_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(67, 9, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight[2] = 0
        model.weight[3] *= 1e-4
        model.weight[4] = torch.arange(67) - 33.5  # ties: the codes of halves
    _, binding, _ = bound(model, torch.rand(5, 67, dtype=dtype))
    (recipe,) = (r.recipe for r in binding.recipes)
    wanted = fx.quantize_weight(model.weight, "int8/channel")[:2]  # no zero point, no tensor scale
    for made, want in zip(recipe.fold(model.weight.detach()), wanted, strict=True):
        assert torch.equal(made, want)
        assert made.dtype is want.dtype


class Twice(nn.Module):
    """A weight that the model itself joins from one parameter, twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.ops.aten.cat.default([self.part, self.part]))


def test_a_parameter_that_is_joined_twice_is_packed_twice() -> None:
    captured, binding, args = bound(Twice(), X)
    (out,) = call_bound(captured.gm, binding, args)
    assert out.shape == (*X.shape[:-1], 16)
    assert torch.equal(out[..., :8], out[..., 8:])


def test_binding_leaves_the_folded_constants_as_they_are() -> None:
    captured = selected(Mixed(), X, config=MIXED)
    constants = list(folded_constants(captured.gm).values())
    before = [str(constant.expression.graph) for constant in constants]
    assert any("quantize_weight" in text for text in before)
    bind(captured.gm, captured)
    assert [str(constant.expression.graph) for constant in constants] == before
