"""fold-weights: bit-equal, once for what is tied, and again for another set of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.folding import FoldedConstant, folded_constants
from fxquant.graphs import CapturedGraph
from fxquant.passes import FoldWeights
from fxquant.spec import PRESETS, QuantConfig
from tests.passes.helpers import Config, Forward, Linears, X, check_pass, nodes_of, run, staged

fx = torch.ops.fxquant


def unfolded(forward: Forward, config: Config = "int8dq", **options: Any) -> CapturedGraph:
    return staged(Linears(forward, **options), X, config=config, before="fold-weights")


def constants_of(captured: CapturedGraph) -> list[FoldedConstant]:
    return list(dict.fromkeys(folded_constants(captured.gm).values()))


def sources_of(captured: CapturedGraph) -> list[tuple[str, ...]]:
    paths = {w.name: w.paths[0] for w in captured.weights}
    return [tuple(paths[name] for name in constant.sources) for constant in constants_of(captured)]


def chained(m: Any, x: Tensor) -> Tensor:
    return m.d(torch.cat([m.a(x), m.b(x)], -1)) + F.silu(m.c(x))


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_folding_is_bit_equal(preset: str, bias: bool) -> None:
    captured = unfolded(chained, preset, widths=(8, 8, 8, 8), bias=bias)
    check_pass(FoldWeights(), captured, X, changed=3 if bias else 2)  # joined weights, d's, and the joined bias
    assert not nodes_of(captured.gm, fx.quantize_weight.default)
    wide = [("a.weight", "b.weight", "c.weight"), ("d.weight",)]
    assert sources_of(captured) == ([*wide, ("a.bias", "b.bias", "c.bias")] if bias else wide)


def test_a_bias_that_is_one_parameter_stays_what_it_is() -> None:
    captured = unfolded(lambda m, x: m.a(x), bias=True)
    check_pass(FoldWeights(), captured, X, changed=1)
    assert captured.gm.graph.find_nodes(op="get_attr", target="a_bias")


def test_what_is_named_after_the_site() -> None:
    captured = unfolded(lambda m, x: m.a(x) * m.b(x), "int4wo", bias=True)
    check_pass(FoldWeights(), captured, X)
    assert list(folded_constants(captured.gm)) == ["a_b_codes", "a_b_scale", "a_b_zero_point", "a_b_bias"]


def test_tied_weights_are_folded_once() -> None:
    captured = unfolded(lambda m, x: m.a(x) + m.a(torch.relu(x)))
    check_pass(FoldWeights(), captured, X, changed=1)
    assert sources_of(captured) == [("a.weight",)]


def test_two_specs_of_one_weight_are_two_foldings() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(torch.relu(x))

    config = QuantConfig("int8dq", rules={"b": "int4wo"})
    captured = staged(Tied(), X, config=config, before="fold-weights")
    check_pass(FoldWeights(), captured, X, changed=2)
    one, other = constants_of(captured)
    assert one.sources == other.sources
    assert one.key != other.key


def doubled(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.a.weight * 2)


def lora(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.a.weight + 0.5 * (m.low_b @ m.low_a))


def weight_norm(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.a.weight * (m.b.weight.norm(dim=1, keepdim=True) / m.a.weight.norm(dim=1, keepdim=True)))


def transposed(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.a.bias, x, m.table.view(16, 8))


EXPRESSIONS = [doubled, lora, weight_norm, transposed]


@pytest.mark.parametrize("forward", EXPRESSIONS, ids=lambda f: f.__name__)
def test_expressions_of_parameters_are_folded(forward: Forward) -> None:
    captured = unfolded(forward, bias=True)
    check_pass(FoldWeights(), captured, X, changed=1)
    codes = captured.gm.graph.find_nodes(op="get_attr", target=constants_of(captured)[0].names[0])
    assert getattr(captured.gm, str(codes[0].target)).dtype is torch.int8


@pytest.mark.parametrize("forward", EXPRESSIONS, ids=lambda f: f.__name__)
def test_the_expression_quantizes_another_set_of_parameters(forward: Forward) -> None:
    captured = staged(Linears(forward, bias=True), X)
    (constant,) = constants_of(captured)
    other = {w.name: torch.rand_like(getattr(captured.gm, w.name)) for w in captured.weights}
    with torch.no_grad():
        tensors = constant.expression(*(other[name] for name in constant.sources))
    wanted = unfolded(forward, bias=True)
    for weight in wanted.weights:
        getattr(wanted.gm, weight.name).data.copy_(other[weight.name])
    (quantize,) = nodes_of(wanted.gm, fx.quantize_weight.default)
    (output,) = wanted.gm.graph.find_nodes(op="output")
    output.args = ((quantize,),)
    wanted.gm.recompile()
    (parts,) = run(wanted.gm, [X])
    assert len(tensors) == 2  # codes and scale: the spec has no more
    assert all(torch.equal(got, want) for got, want in zip(tensors, parts, strict=False))


def test_a_parametrized_weight_is_folded() -> None:
    model = Linears(lambda m, x: m.a(x))
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("a"))
    captured = staged(model, X, before="fold-weights")
    check_pass(FoldWeights(), captured, X, changed=1)
    (sources,) = sources_of(captured)
    assert sorted(sources) == [f"a.parametrizations.weight.original{i}" for i in (0, 1)]


def keys(forward: Forward, *inputs: Any, config: Config = "int8dq", dynamic: bool = False) -> set[str]:
    captured = staged(Linears(forward, bias=True), *(inputs or (X,)), config=config, dynamic=dynamic)
    return {constant.key for constant in constants_of(captured)}


def test_the_key_is_the_same_in_every_graph_that_computes_the_same() -> None:
    """Prefill and decode graphs, static and dynamic ones, share packed weights by it."""
    assert keys(lora) == keys(lora, X[:1]) == keys(lora, X.reshape(1, 5, 16)) == keys(lora, dynamic=True)
    assert keys(lambda m, x: m.a(x) * m.b(x)) == keys(lambda m, x: F.silu(m.a(x) + m.b(x)))


def test_the_key_tells_other_expressions_apart() -> None:
    expressions: list[Forward] = [
        lambda m, x: m.a(x),
        doubled,
        lambda m, x: F.linear(x, m.a.weight * 3),
        lambda m, x: F.linear(x, m.a.weight + m.b.weight),
        lambda m, x: F.linear(x, m.a.weight - m.b.weight),
        lora,
    ]
    found = [keys(forward) for forward in expressions]
    found.append(keys(doubled, config="int8wo") ^ keys(doubled))  # same codes, whatever x is
    found.append(keys(doubled, config="int4wo"))
    assert found[-2] == set()
    del found[-2]
    assert len(set().union(*found)) == len(found)


def test_without_evaluation_it_is_the_same_graph_of_fake_tensors() -> None:
    captured = unfolded(chained, widths=(8, 8, 8, 8), bias=True)
    plain = captured.copy()
    FoldWeights(evaluate=True).run(captured.gm)
    FoldWeights(evaluate=False).run(plain.gm)
    assert str(plain.gm.graph) == str(captured.gm.graph)
    for name, constant in folded_constants(plain.gm).items():
        fake, real = getattr(plain.gm, name), getattr(captured.gm, name)
        assert isinstance(fake, torch._subclasses.FakeTensor)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert constant.key == folded_constants(captured.gm)[name].key
