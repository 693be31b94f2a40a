"""annotate: what each product gets, and the words for those that get nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.annotation import PassResult, note_of
from fxquant.capture import from_export
from fxquant.passes import Annotate, run_passes
from fxquant.runner import Deciding
from fxquant.spec import PRESETS, Decision, QuantConfig
from tests.helpers import capture
from tests.passes.helpers import Forward, Linears, X, check_pass, nodes_of

LINEAR = torch.ops.aten.linear.default


def decisions(config: QuantConfig | str, forward: Forward) -> tuple[dict[str, tuple[Any, str]], PassResult]:
    captured = capture(Linears(forward, bias=True), X)
    config = QuantConfig(config) if isinstance(config, str) else config
    result = run_passes(captured.gm, [Annotate(Deciding(config))])["annotate"]
    notes = {note_of(n).path: (note_of(n).spec, note_of(n).reason) for n in nodes_of(captured.gm, LINEAR)}
    return notes, result


def chain(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.b(torch.cat([m.a(x), m.a(x)], -1))) + m.c(x)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_product_gets_the_preset(preset: str) -> None:
    notes, result = decisions(preset, chain)
    assert notes == dict.fromkeys(("a", "b", "c"), (PRESETS[preset], "default"))
    assert result == PassResult(changed=4)  # a is called twice


def test_rules_exclude_and_include_are_written_with_their_reason() -> None:
    config = QuantConfig("int8dq", rules={"b": "int8wo", "c": None}, exclude="a")
    notes, result = decisions(config, chain)
    assert notes == {
        "a": (None, 'exclude "a"'),
        "b": (PRESETS["int8wo"], 'rule "b=w=int8/channel"'),
        "c": (None, 'rule "c=none"'),
    }
    assert [(d.where, d.reason) for d in result.declined] == [*[("a", 'exclude "a"')] * 2, ("c", 'rule "c=none"')]
    notes, _ = decisions(QuantConfig("int8dq", include="a"), chain)
    assert [spec is None for spec, _ in notes.values()] == [False, True, True]


def test_it_changes_notes_only() -> None:
    captured = capture(Linears(chain), X)
    result = run_passes(captured.copy().gm, [Annotate(Deciding(QuantConfig()))])["annotate"]
    assert result.changed == 4
    untouched = captured.copy()
    nobody = Annotate(lambda paths, kind: Decision(None, f"never {paths}"))
    declined = check_pass(nobody, untouched, X, changed=0).declined
    assert next((d.where, d.reason) for d in declined) == ("a", "never ('a',)")
    assert not any(note_of(n).spec for n in captured.gm.graph.nodes)  # a copy has notes of its own


def writes_to_weight(m: Any, x: Tensor) -> Tensor:
    m.table.add_(1.0)
    return F.linear(x, m.table)


def writes_to_weight_by_operator(m: Any, x: Tensor) -> Tensor:
    m.table += 1.0
    return F.linear(x, m.table)


def writes_to_part_of_weight(m: Any, x: Tensor) -> Tensor:
    m.table[2:4].mul_(2.0)
    return F.linear(x, m.table * 2)


def writes_to_bias(m: Any, x: Tensor) -> Tensor:
    m.row.add_(1.0)
    return F.linear(x, m.a.weight, m.row * 2)


def writes_behind(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.table)
    m.table.copy_(m.table * 0.5)
    return y


WRITES = [writes_to_weight, writes_to_weight_by_operator, writes_to_part_of_weight, writes_to_bias, writes_behind]


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_a_weight_that_the_model_writes_to_stays_float(forward: Forward) -> None:
    """Its codes would be those of the value before the call. The graph still writes, at every call."""
    model = Linears(forward)
    model.register_buffer("row", torch.rand(8))
    captured = capture(model, X)
    results = run_passes(captured.gm, [Annotate(Deciding(QuantConfig()))])
    reasons = {note_of(n).reason for n in captured.gm.graph.nodes} - {""}
    assert reasons == {"the model writes to the weight while it runs"}
    assert results["annotate"].changed == 0


class Exported(nn.Module):
    def __init__(self, weight: Tensor, forward: Any) -> None:
        super().__init__()
        self.register_buffer("w", weight)
        self.compute = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


@pytest.mark.parametrize(
    ("weight", "x", "forward", "words"),
    [
        (torch.rand(8, 16), X, lambda m, x: F.linear(x, x * 2), "the weight is computed from an activation (at mul)"),
        (
            torch.rand(8, 16).double(),
            X.double(),
            lambda m, x: F.linear(x, m.w),
            "the weight is torch.float64: float32, bfloat16 or float16 is needed",
        ),
        (torch.rand(16), X, lambda m, x: F.linear(x, m.w), "the weight has 1 dimensions, a linear wants 2"),
        (
            torch.rand(0, 16),
            X,
            lambda m, x: F.linear(x, m.w),
            "the weight's shape (0, 16) is empty or not fixed",
        ),
    ],
    ids=["activation", "float64", "vector", "empty"],
)
def test_what_cannot_be_quantized_says_why(weight: Tensor, x: Tensor, forward: Any, words: str) -> None:
    """Through export, where every linear is the canonical op from the start."""
    captured = from_export(torch.export.export(Exported(weight, forward), (x,)))
    result = run_passes(captured.gm, [Annotate(Deciding(QuantConfig()))])["annotate"]
    assert [d.reason for d in result.declined] == [words]
    (site,) = nodes_of(captured.gm, LINEAR)
    assert (note_of(site).spec, note_of(site).reason) == (None, words)
