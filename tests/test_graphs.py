"""The questions that all passes ask a graph."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.annotation import Note, note_of, write_note
from fxquant.graphs import (
    add_call,
    ancestors,
    autocast_regions,
    constant_inputs,
    constant_nodes,
    copy_of,
    entered,
    infer_value,
    is_written_between,
    refresh_values,
    remove_dead,
    source_line,
    target_name,
    value_of,
    written_by,
    written_nodes,
)
from tests.helpers import capture
from tests.passes.helpers import Forward, Linears, X, assert_values_are_true, nodes_of


def graph_of(forward: Forward, x: Tensor = X) -> GraphModule:
    return capture(Linears(forward), x).gm


def named(gm: GraphModule, *names: str) -> list[Node]:
    by_name = {node.name: node for node in gm.graph.nodes}
    return [by_name[name] for name in names]


def names(nodes: Any) -> set[str]:
    return {node.name for node in nodes}


def last_call(gm: GraphModule) -> Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op in ("call_function", "call_method"))


# Which nodes are constant, and which calls write in place.


@pytest.mark.parametrize(
    ("expression", "is_constant"),
    [
        (lambda m, x: m.table * 2, True),
        (lambda m, x: m.table.t(), True),
        (lambda m, x: m.low_b @ m.low_a, True),
        (lambda m, x: torch.cat([m.table, m.low_a]), True),
        (lambda m, x: F.normalize(m.table), True),
        (lambda m, x: m.table.expand(8, 16), True),
        (lambda m, x: m.table * x.sum(), False),
        (lambda m, x: torch.randn_like(m.table), False),
        (lambda m, x: F.dropout(m.table, training=True), False),
        (lambda m, x: torch.bernoulli(m.table), False),
        (lambda m, x: torch.normal(m.table, 1.0), False),
        (lambda m, x: torch.empty_like(m.table), False),
        (lambda m, x: torch.ones(3), False),
    ],
)
def test_constants_are_what_parameters_alone_decide(expression: Forward, is_constant: bool) -> None:
    gm = graph_of(expression)
    assert (last_call(gm) in constant_nodes(gm)) is is_constant


def foreach(m: Any, x: Tensor) -> Tensor:
    torch._foreach_add_([m.table, m.low_a], 1.0)
    return m.table


WRITES: list[Forward] = [
    lambda m, x: m.table.add_(1.0),
    lambda m, x: torch.relu_(m.table),
    lambda m, x: F.relu(m.table, inplace=True),
    lambda m, x: F.leaky_relu(m.table, 0.1, True),
    lambda m, x: nn.Hardtanh(inplace=True)(m.table),
    lambda m, x: torch.mul(m.table, 2, out=m.table),
    lambda m, x: m.table.copy_(x.sum()),
    lambda m, x: torch.ops.aten.add_.Tensor(m.table, 1.0),
    lambda m, x: m.table[0].zero_(),
    lambda m, x: m.table.view(16, 8)[:, 2].mul_(2.0),
    lambda m, x: m.table.t().detach().add_(1.0),
    foreach,
]


def by_operator(m: Any, x: Tensor) -> Tensor:
    m.table *= 2.0
    return m.table


def by_index(m: Any, x: Tensor) -> Tensor:
    m.table[1] = 0.0
    return m.table


@pytest.mark.parametrize("forward", [*WRITES, by_operator, by_index])
def test_every_way_of_writing_is_seen(forward: Forward) -> None:
    gm = graph_of(lambda m, x: (forward(m, x), m.table + 0)[1])
    (table,) = gm.graph.find_nodes(op="get_attr", target="table")
    assert table in written_nodes(gm)
    assert sum(bool(written_by(node)) for node in gm.graph.nodes) == 1
    assert last_call(gm) in written_nodes(gm)  # what is computed from it changes too


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.table.add(1.0),
        lambda m, x: F.relu(m.table, False),
        lambda m, x: F.leaky_relu(m.table, True),  # a slope of 1
        lambda m, x: m.table.clone().add_(1.0),
        lambda m, x: m.table.__add__(x.sum()),
        lambda m, x: (m.table * 2).mul_(m.table),
    ],
)
def test_what_writes_elsewhere_or_nowhere(forward: Forward) -> None:
    gm = graph_of(forward)
    (table,) = gm.graph.find_nodes(op="get_attr", target="table")
    assert table not in written_nodes(gm)


def test_a_write_between_is_one_to_the_same_memory() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        a = h.sin()
        x_too = (x * 2.0).neg_()
        b = h.cos()
        h[1:].neg_()
        return a + b + h.tan() + x_too

    gm = graph_of(forward)
    h, a, b, tan = named(gm, "h", "a", "b", "tan")
    assert not is_written_between(h, a, b)
    assert is_written_between(h, b, tan)
    assert is_written_between(h, a, tan)


# Editing.


def test_dead_constants_and_our_own_dead_ops_go_and_nothing_else() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        h.add_(1.0)
        m.table.add_(1.0)
        return h

    gm = graph_of(forward)
    (output,) = gm.graph.find_nodes(op="output")
    like = output.prev
    with gm.graph.inserting_before(output):
        (low_a,) = [gm.graph.get_attr("table")]
        low_a.meta["val"] = value_of(gm.graph.find_nodes(op="get_attr", target="table")[0])
        constant = add_call(gm.graph, torch.ops.aten.t.default, (low_a,), like=like, made_by="test")
        add_call(gm.graph, torch.ops.aten.neg.default, (constant,), like=like, made_by="test")
        (x,) = gm.graph.find_nodes(op="placeholder")
        add_call(gm.graph, torch.ops.fxquant.quantize_dynamic.default, (x, "int8/token"), like=like, made_by="test")
        kept = add_call(gm.graph, torch.ops.aten.neg.default, (x,), like=like, made_by="test")
    before = names(gm.graph.nodes)
    remove_dead(gm)
    assert before - names(gm.graph.nodes) == {"table_1", "t", "neg", "quantize_dynamic"}
    assert kept in gm.graph.nodes
    assert len(gm.graph.find_nodes(op="call_method", target="add_")) == 2


def test_a_copy_has_its_own_graph_and_meta_but_the_same_tensors() -> None:
    gm = graph_of(lambda m, x: m.a(x) + m.table.sum())
    twin = copy_of(gm)
    for node, copied in zip(gm.graph.nodes, twin.graph.nodes, strict=True):
        assert node is not copied
        assert node.meta is not copied.meta
        assert node.meta == copied.meta
    assert twin.a_weight is gm.a_weight
    torch.testing.assert_close(twin(X), gm(X), rtol=0, atol=0)


def test_releasing_lets_go_of_the_parameters() -> None:
    model = Linears(lambda m, x: m.a(x))
    captured = capture(model, X)
    weight = weakref.ref(model.get_parameter("a.weight"))
    captured.release()
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
    assert isinstance(captured.gm.a_weight, torch._subclasses.FakeTensor)
    captured.release()  # and again: nothing to do


def test_a_new_call_takes_the_story_of_the_node_that_it_stands_for() -> None:
    gm = graph_of(lambda m, x: m.a(x))
    (linear,) = nodes_of(gm, torch.ops.aten.linear.default)
    with gm.graph.inserting_after(linear):
        once = add_call(gm.graph, torch.ops.aten.neg.default, (linear,), like=linear, made_by="first")
        twice = add_call(gm.graph, torch.ops.aten.neg.default, (once,), like=once, made_by="second")
        again = add_call(gm.graph, torch.ops.aten.neg.default, (twice,), like=twice, made_by="second")
    assert note_of(again).made_by == ("first", "second")
    assert note_of(again).paths == note_of(linear).paths == ("a",)
    assert note_of(again).source == note_of(linear).source
    assert again.meta["nn_module_stack"] is linear.meta["nn_module_stack"]
    assert value_of(again).shape == (5, 8)


def test_values_are_refreshed_as_far_as_they_change() -> None:
    gm = graph_of(lambda m, x: (m.a(x).t().contiguous() * 2).view(-1) + m.a(x).view(-1))
    first, second = nodes_of(gm, torch.ops.aten.linear.default)
    strided = value_of(first).new_empty(5, 16)[:, :8]
    for linear in (first, second):
        linear.meta["val"] = strided
    kept = value_of(gm.graph.find_nodes(op="call_method", target="contiguous")[0])
    broken = refresh_values(gm, [first, second])
    assert [n.target for n in broken] == ["view"]
    assert broken[0].args[0] is second
    assert value_of(gm.graph.find_nodes(op="call_method", target="t")[0]).stride() == (1, 16)
    assert value_of(gm.graph.find_nodes(op="call_method", target="contiguous")[0]).stride() == kept.stride()


def test_refreshing_tells_of_an_output_in_another_layout() -> None:
    gm = graph_of(lambda m, x: m.a(x).t())
    (linear,) = nodes_of(gm, torch.ops.aten.linear.default)
    linear.meta["val"] = value_of(linear).new_empty(5, 16)[:, :8]
    assert [n.op for n in refresh_values(gm, [linear])] == ["output"]


def test_autocast_regions_are_known_and_can_be_entered() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = m.b(x)
            with torch.autocast("cpu", enabled=False):
                w = m.c(x)
        return y + z + w

    gm = graph_of(forward)
    regions = autocast_regions(gm)
    mode = value_of(next(iter(gm.graph.nodes))).fake_mode
    dtypes = []
    for node in nodes_of(gm, torch.ops.aten.linear.default):
        with entered(regions.get(node, ())):
            dtypes.append(infer_value(node, mode).dtype)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert_values_are_true(gm, [X])


def test_ancestors_come_in_graph_order() -> None:
    gm = graph_of(lambda m, x: F.linear(x, m.a.weight + m.low_b @ m.low_a) + m.table.sum())
    (linear,) = nodes_of(gm, torch.ops.aten.linear.default)
    found = ancestors([linear.args[1]])  # pyright: ignore[reportArgumentType]
    assert found == [n for n in gm.graph.nodes if n in set(found)]
    assert [n.target for n in constant_inputs([linear])] == ["a_weight", "low_b", "low_a"]


# Words.


@pytest.mark.parametrize(
    ("forward", "word"),
    [
        (lambda m, x: torch.ops.aten.neg.default(x), "aten.neg"),
        (lambda m, x: torch.relu(x), "relu"),
        (lambda m, x: x.relu(), "relu"),
        (lambda m, x: x + 1, "add"),
        (lambda m, x: m.a(x), "aten.linear"),
    ],
)
def test_calls_have_short_words(forward: Forward, word: str) -> None:
    assert target_name(last_call(graph_of(forward))) == word


def test_the_source_line_is_the_users() -> None:
    gm = graph_of(lambda m, x: m.a(x))
    line = source_line(last_call(gm))
    assert line.startswith("test_graphs.py:")
    node = gm.graph.find_nodes(op="output")[0]
    node.meta.pop("stack_trace", None)
    assert source_line(node) == ""


def test_no_value_is_invented_for_what_is_no_call() -> None:
    gm = graph_of(lambda m, x: m.a(x))
    node = next(iter(gm.graph.nodes))
    with pytest.raises(TypeError, match="no value can be inferred for a "):
        infer_value(node, value_of(node).fake_mode)


def test_a_weight_is_found_by_name() -> None:
    captured = capture(Linears(lambda m, x: m.a(x)), X)
    assert captured.weight("a_weight").paths == ("a.weight",)
    write_note(next(iter(captured.gm.graph.nodes)), Note(("p",)))
    assert note_of(next(iter(captured.copy().gm.graph.nodes))).paths == ("p",)
