"""Each claim of a stage's spec: a graph that keeps it passes, a graph that breaks it is named with its node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant import ops, verify  # ops declares torch.ops.fxquant
from fxquant.annotation import amend_note
from fxquant.errors import UnloweredSite, VerificationFailed
from fxquant.graphs import VALUE_KEY
from fxquant.passes import Annotate, FoldWeights, FuseSiblings, InsertQdq, run_passes
from fxquant.passes.base import Pass
from fxquant.spec import Decision, preset
from tests.helpers import capture, linears

assert ops is not None

PASSES: tuple[Pass, ...] = (Annotate(lambda paths, kind: Decision(preset("int8dq"), "")), FuseSiblings(), InsertQdq())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) @ x.transpose(0, 1) + (self.w @ self.w)[0, 0]


def at(*steps: Pass) -> GraphModule:
    captured = capture(Two(), torch.randn(4, 8))
    run_passes(captured.gm, steps)
    return captured.gm


def node_of(gm: GraphModule, name: str) -> Node:
    return next(n for n in gm.graph.nodes if verify.target_name(n) == name)


def test_each_stage_of_a_good_graph_passes() -> None:
    verify.captured(at())
    verify.quantized(at(*PASSES))
    verify.quantized(at(*PASSES, FoldWeights()))
    verify.lowered(at(*PASSES, FoldWeights()), strict=False)


def no_value(gm: GraphModule) -> None:
    del node_of(gm, "transpose").meta[VALUE_KEY]


def no_attribute(gm: GraphModule) -> None:
    del gm.second_weight


def other_tensor(gm: GraphModule) -> None:
    gm.second_weight = nn.Parameter(torch.zeros(3, 8))


def wrong_order(gm: GraphModule) -> None:
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[:2]
    first.append(second)
    second.append(first)


def plain_matmul(gm: GraphModule) -> None:
    product = node_of(gm, "aten.linear")
    product.target, product.args = torch.matmul, product.args[:2]


def linear_of_old(gm: GraphModule) -> None:
    node_of(gm, "aten.linear").target = torch.nn.functional.linear


BROKEN: dict[str, tuple[Callable[[GraphModule], None], str]] = {
    "no value": (no_value, r"'transpose.*meta\['val'\]"),
    "no attribute": (no_attribute, "references nonexistent attribute second_weight"),
    "other tensor": (other_tensor, r"holds \(3, 8\).*its value says \(8, 8\)"),
    "wrong order": (wrong_order, "lint"),
    "plain matmul": (plain_matmul, "matmul reads a weight, is none of aten.linear, .*, and has no reason"),
    "uncanonical linear": (linear_of_old, "linear reads a weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_captured_names_what_is_broken(case: str) -> None:
    damage, words = BROKEN[case]
    gm = at()
    damage(gm)
    with pytest.raises(VerificationFailed, match=words) as raised:
        verify.captured(gm)
    assert raised.value.stage == "captured"


def test_a_reason_excuses_a_product() -> None:
    gm = at()
    plain_matmul(gm)
    amend_note(node_of(gm, "matmul"), reason="for this test")
    verify.captured(gm)


def site(gm: GraphModule) -> Node:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]


def bare_activation(gm: GraphModule) -> None:
    product = site(gm)
    product.update_arg(0, next(iter(gm.graph.nodes)))


def bare_weight(gm: GraphModule) -> None:
    site(gm).update_arg(1, next(n for n in gm.graph.nodes if n.target == "first_weight"))


def other_spec(gm: GraphModule) -> None:
    node_of(gm, "fxquant.dequantize").update_arg(3, "int8/tensor")


def other_codes(gm: GraphModule) -> None:
    codes: Any = node_of(gm, "fxquant.dequantize").args[0]
    codes.meta[VALUE_KEY] = codes.meta[VALUE_KEY].to(torch.int32)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (bare_activation, r"its activation should be int8/token, but it is .*, not fxquant.dequantize"),
        (bare_weight, r"its weight should be int8/channel, but it is first_weight, not fxquant.dequantize"),
        (other_spec, "it is dequantized as int8/tensor"),
        (other_codes, "its codes are torch.int32, not torch.int8"),
    ],
)
def test_quantized_names_what_is_broken(damage: Callable[[GraphModule], None], words: str) -> None:
    gm = at(*PASSES)
    damage(gm)
    with pytest.raises(VerificationFailed, match=words) as raised:
        verify.quantized(gm)
    assert raised.value.stage == "quantized"
    assert raised.value.node == site(gm).name


def test_a_reshaped_operand_is_still_behind_codes() -> None:
    gm = at(*PASSES)
    product = site(gm)
    operand = product.args[0]
    assert isinstance(operand, Node)
    with gm.graph.inserting_before(product):
        view = gm.graph.call_method("reshape", (operand, -1, 8))
    view.meta[VALUE_KEY] = operand.meta[VALUE_KEY]
    product.update_arg(0, view)
    verify.quantized(gm)


def test_lowered_graph_quantizes_no_weight() -> None:
    with pytest.raises(VerificationFailed, match="quantizes a weight at each call"):
        verify.lowered(at(*PASSES), strict=False)


def test_strict_names_the_sites_left() -> None:
    gm = at(*PASSES, FoldWeights())
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    amend_note(first, reason="its rows are odd")
    amend_note(second, spec=None)
    with pytest.raises(UnloweredSite, match="first: its rows are odd") as raised:
        verify.lowered(gm, strict=True)
    assert "second" not in str(raised.value)


def test_constant_products_are_no_sites() -> None:
    captured = capture(Two(), torch.randn(4, 8))
    words = [verify.product_word(n) for n in captured.gm.graph.nodes if verify.product_word(n)]
    assert words.count("linear") == len(linears(captured)) == 2
    assert words.count("matmul") == 2  # of activations, and of parameters
