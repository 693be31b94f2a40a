"""share-quantize: one quantize for a value, as long as the value is the same."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import note_of
from fxquant.graphs import CapturedGraph
from fxquant.passes import ShareQuantize
from fxquant.spec import QuantConfig
from tests.helpers import capture
from tests.passes.helpers import (
    Forward,
    Linears,
    X,
    assert_same_graph,
    check_pass,
    nodes_of,
    quantized_activation,
    quantized_weight,
    staged,
)

fx = torch.ops.fxquant
APART = QuantConfig("int8dq", fuse=False)


def inserted(forward: Forward, config: QuantConfig = APART) -> CapturedGraph:
    return staged(Linears(forward), X, config=config, before="share-quantize")


def test_two_linears_of_one_input_share_its_codes() -> None:
    def after(m: Any, x: Tensor) -> Tensor:
        inner = quantized_activation(x, "int8/token")
        a, b = (quantized_weight(w, "int8/channel") for w in (m.a.weight, m.b.weight))
        return F.linear(inner, a) + F.linear(inner, b)

    captured = inserted(lambda m, x: m.a(x) + m.b(x))
    check_pass(ShareQuantize(), captured, X, changed=1)
    assert_same_graph(captured.gm, capture(Linears(after), X).gm)
    (quantize,) = nodes_of(captured.gm, fx.quantize_dynamic.default)
    assert note_of(quantize).paths == ("a", "b")


def test_a_weight_that_is_used_twice_is_quantized_once() -> None:
    captured = inserted(lambda m, x: m.a(x) + m.a(torch.relu(x)))
    check_pass(ShareQuantize(), captured, X, changed=1)
    assert len(nodes_of(captured.gm, fx.quantize_weight.default)) == 1
    assert len(nodes_of(captured.gm, fx.quantize_dynamic.default)) == 2


def test_other_specs_are_not_shared() -> None:
    rules = QuantConfig("int8dq", fuse=False, rules={"b": "w=int8/channel x=int8/tensor"})
    check_pass(ShareQuantize(), inserted(lambda m, x: m.a(x) + m.b(x), rules), X, changed=0)


def test_codes_from_before_a_write_are_not_those_from_after() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        left = m.a(h)
        h.mul_(h)
        return left + m.b(h)

    check_pass(ShareQuantize(), inserted(forward), X, changed=0)


def test_the_models_own_getitems_are_left_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.stack([x, x])
        return m.a(h[0]) + m.b(h[1]) + h[0].sum() + h[:, [0, 1]].sum() + h[:, [0, 1]].sum()

    captured = inserted(forward)
    before = len(captured.gm.graph.nodes)
    check_pass(ShareQuantize(), captured, X, changed=0)
    assert len(captured.gm.graph.nodes) == before
