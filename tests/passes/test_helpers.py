"""The helpers of these tests can fail: a comparison that never does would prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.annotation import PassResult
from fxquant.passes import Pass
from tests.helpers import capture
from tests.passes.helpers import X, assert_same_graph, assert_values_are_true, check_pass

W = torch.rand(3, 16)


class Computes(nn.Module):
    def __init__(self, compute: Callable[[Tensor, Tensor], Any], weight: Tensor = W) -> None:
        super().__init__()
        self.w, self.compute = nn.Parameter(weight.clone()), compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(x, self.w)


def graph(compute: Callable[[Tensor, Tensor], Any], weight: Tensor = W) -> GraphModule:
    return capture(Computes(compute, weight), X).gm


def test_names_and_the_order_of_independent_nodes_do_not_count() -> None:
    def one(x: Tensor, w: Tensor) -> Tensor:
        left = torch.relu(x)
        return left + torch.sigmoid(x) * w.sum()

    def other(x: Tensor, w: Tensor) -> Tensor:
        total = w.sum()
        right = torch.sigmoid(x)
        return torch.relu(x) + right * total

    assert_same_graph(graph(one), graph(other))


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (lambda x, w: x.relu(), lambda x, w: x.sigmoid(), "calls relu, expected sigmoid"),
        (lambda x, w: x.sum(0), lambda x, w: x.sum(1), "0, expected 1"),
        (lambda x, w: x.sum(0, keepdim=True), lambda x, w: x.sum(0, keepdim=False), "True, expected False"),
        (lambda x, w: x.sum(0), lambda x, w: x.sum((0,)), "0, expected"),
        (lambda x, w: x[1:2], lambda x, w: x[1:3], "2, expected 3"),
        (lambda x, w: torch.add(x.relu(), x.relu()), lambda x, w: torch.add(*[x.relu()] * 2), "shared differently"),
        (lambda x, w: torch.add(*[x.relu()] * 2), lambda x, w: torch.add(x.relu(), x.relu()), "shared differently"),
        (lambda x, w: x @ w.t(), lambda x, w: x @ x.t(), "expected"),
        (lambda x, w: x * 1.0, lambda x, w: (x * 1.0).add_(1.0), "got 0 calls that write in place, expected 1"),
    ],
)
def test_a_difference_is_found(one: Any, other: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert_same_graph(graph(one), graph(other))


def test_weights_are_compared_by_value_and_dtype() -> None:
    def total(x: Tensor, w: Tensor) -> Tensor:
        return x.sum() + w.sum()

    assert_same_graph(graph(total), graph(total, W.clone()))
    with pytest.raises(AssertionError, match="weights of other values"):
        assert_same_graph(graph(total), graph(total, W + 1))
    with pytest.raises(AssertionError, match=r"a weight \[3, 16\] torch.float32, expected \[3, 16\] torch.float64"):
        assert_same_graph(graph(total), graph(total, W.double()))


class Breaks(Pass):
    """Does to the graph what the test says."""

    name: ClassVar[str] = "breaks"

    def __init__(self, edit: Callable[[GraphModule], int]) -> None:
        self.edit = edit

    def run(self, gm: GraphModule) -> PassResult:
        return PassResult(self.edit(gm))


def doubled(gm: GraphModule) -> int:
    (relu,) = gm.graph.find_nodes(op="call_method", target="relu")
    relu.target = "sigmoid"
    return 1


def left_dead(gm: GraphModule) -> int:
    (relu,) = gm.graph.find_nodes(op="call_method", target="relu")
    with gm.graph.inserting_after(relu):
        gm.graph.node_copy(relu, lambda n: n).meta = dict(relu.meta)
    return 1


def without_value(gm: GraphModule) -> int:
    (relu,) = gm.graph.find_nodes(op="call_method", target="relu")
    del relu.meta["val"]
    return 1


def never_done(gm: GraphModule) -> int:
    return 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (doubled, "not equal"),
        (left_dead, "leaves 1 dead node"),
        (without_value, "relu has no value"),
        (never_done, "a second run changes 1"),
    ],
)
def test_a_pass_that_breaks_its_promise_is_caught(edit: Callable[[GraphModule], int], words: str) -> None:
    captured = capture(lambda x: x.relu() + 1, X)
    with pytest.raises(AssertionError, match=words):
        check_pass(Breaks(edit), captured, X)


def test_a_wrong_value_is_found() -> None:
    captured = capture(lambda x: x.relu() + 1, X)
    (relu,) = captured.gm.graph.find_nodes(op="call_method", target="relu")
    relu.meta["val"] = relu.meta["val"].t()
    with pytest.raises(AssertionError, match="its value says"):
        assert_values_are_true(captured.gm, [X])
