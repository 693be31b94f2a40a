"""Constant expressions cut out of a graph: their names, their text, and that they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.folding import FoldedConstant, fold, folded_constants
from fxquant.graphs import value_of
from tests.helpers import capture
from tests.passes.helpers import Forward, Linears, X, nodes_of, run, same_bits

LINEAR = torch.ops.aten.linear.default


def graph_of(forward: Forward) -> tuple[GraphModule, list[Node]]:
    """The graph of linears with computed weights, and those weights."""
    gm = capture(Linears(forward), X).gm
    return gm, [n.args[1] for n in nodes_of(gm, LINEAR)]  # pyright: ignore[reportReturnType]


def sum_of_two(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.b.weight * 0.5 + m.a.weight)


def folded(gm: GraphModule, weight: Node, name: str = "w", *, evaluate: bool = True) -> FoldedConstant:
    (attribute,) = fold(gm, [weight], [name], evaluate=evaluate)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return folded_constants(gm)[str(attribute.target)]


def test_the_graph_computes_the_same_with_a_buffer_in_place_of_the_expression() -> None:
    gm, (weight,) = graph_of(sum_of_two)
    wanted = run(gm, [X])
    constant = folded(gm, weight)
    same_bits(run(gm, [X]), wanted)
    assert constant.names == ("w",)
    assert [str(n.target) for n in gm.graph.find_nodes(op="get_attr")] == ["w"]
    assert gm.w.dtype is torch.float32
    assert not gm.w.requires_grad


def test_the_expression_takes_its_sources_in_the_order_that_it_names() -> None:
    gm, (weight,) = graph_of(sum_of_two)
    constant = folded(gm, weight)
    given = {name: torch.rand(8, 16) for name in constant.sources}
    (got,) = constant.expression(*given.values())
    torch.testing.assert_close(got, given["b_weight"] * 0.5 + given["a_weight"], rtol=0, atol=0)


def test_the_key_is_the_expression_in_text() -> None:
    gm, (weight,) = graph_of(sum_of_two)
    constant = folded(gm, weight)
    assert constant.key == "mul('%0', 0.5); add('%2', '%1'); -> %3"
    assert constant.sources == ("b_weight", "a_weight")


def test_the_key_does_not_depend_on_what_else_the_graph_reads() -> None:
    """In two graphs of one model the same parameters can come in another order."""

    def reads_first(m: Any, x: Tensor) -> Tensor:
        return sum_of_two(m, x * m.a.weight.sum())

    (one, (weight,)), (other, (same_weight,)) = graph_of(sum_of_two), graph_of(reads_first)
    first, second = folded(one, weight), folded(other, same_weight)
    assert (first.key, first.sources) == (second.key, second.sources)
    graphs = [capture(Linears(forward), X).gm.graph for forward in (sum_of_two, reads_first)]
    one_order, other_order = ([n.target for n in graph.find_nodes(op="get_attr")] for graph in graphs)
    assert one_order == other_order[::-1]


def test_the_buffer_keeps_the_story_of_the_node_that_it_replaces() -> None:
    gm, (weight,) = graph_of(sum_of_two)
    value, note = value_of(weight), weight.meta["fxquant"]
    (attribute,) = fold(gm, [weight], ["w"], evaluate=True)
    assert value_of(attribute) is value
    assert attribute.meta["fxquant"] is note


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("layers.0.attn.{q,k}_proj_codes", "layers_0_attn_q_k_proj_codes"),
        ("_codes", "codes"),
        ("", "folded"),
        ("forward", "forward_1"),
        ("a_weight", "a_weight_1"),
    ],
)
def test_names_are_words_that_nothing_else_has(wanted: str, name: str) -> None:
    gm, (weight,) = graph_of(sum_of_two)
    assert folded(gm, weight, wanted).names == (name,)


def test_two_foldings_of_one_name_do_not_collide() -> None:
    gm, (one, other) = graph_of(lambda m, x: F.linear(x, m.a.weight * 2) + F.linear(x, m.a.weight * 3))
    wanted = run(gm, [X])
    assert folded(gm, one).names == ("w",)
    assert folded(gm, other).names == ("w_1",)
    same_bits(run(gm, [X]), wanted)
    assert folded_constants(gm)["w"].key != folded_constants(gm)["w_1"].key


def test_without_evaluation_the_buffer_is_the_fake_value() -> None:
    gm, (weight,) = graph_of(sum_of_two)
    value = value_of(weight)
    folded(gm, weight, evaluate=False)
    assert gm.w is value


def test_folding_does_not_change_the_parameters() -> None:
    gm, (weight,) = graph_of(sum_of_two)
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    parameters = dict(gm.named_parameters())
    folded(gm, weight)
    for name, old in before.items():
        assert torch.equal(parameters[name], old)
