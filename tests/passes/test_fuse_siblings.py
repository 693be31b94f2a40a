"""fuse-siblings: what joins, into what, and every reason not to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.annotation import PassResult, note_of
from fxquant.graphs import CapturedGraph, value_of
from fxquant.passes import FuseSiblings, run_passes
from fxquant.spec import PRESETS, QuantConfig
from tests.helpers import capture
from tests.passes.helpers import (
    ATOL,
    Forward,
    K,
    Linears,
    X,
    arguments_for,
    assert_same_graph,
    check_pass,
    nodes_of,
    run,
    staged,
    within,
)

aten = torch.ops.aten
LINEAR, CAT, SPLIT, CLONE = aten.linear.default, aten.cat.default, aten.split_with_sizes.default, aten.clone.default


def joined(m: Any, x: Tensor, *linears: nn.Linear) -> list[Tensor]:
    """What the pass should write for these linears."""
    weight = CAT([linear.weight for linear in linears])
    sizes = [linear.out_features for linear in linears]
    bias = () if linears[0].bias is None else (CAT([linear.bias for linear in linears]),)
    return SPLIT(F.linear(x, weight, *bias), sizes, -1)


def annotated(model: nn.Module, *inputs: Tensor, config: QuantConfig | str = "int8dq", **options: Any) -> CapturedGraph:
    return staged(model, *inputs, config=config, before="fuse-siblings", **options)


def fused(before: nn.Module, after: nn.Module | None, x: Tensor = X, changed: int = 1) -> PassResult:
    captured = annotated(before, x)
    result = check_pass(FuseSiblings(), captured, x, changed=changed, compare=within(ATOL))
    if after is not None:
        assert_same_graph(captured.gm, capture(after, x).gm)
    assert not result.declined
    return result


def refused(model: nn.Module, config: QuantConfig | str = "int8dq", x: Tensor = X) -> tuple[str, str]:
    """Where and why the pass declines; check_pass makes sure that it leaves the graph alone."""
    (declined,) = check_pass(FuseSiblings(), annotated(model, x, config=config), x, changed=0).declined
    return declined.where, declined.reason


def test_one_linear_is_left_alone() -> None:
    fused(Linears(lambda m, x: F.silu(m.a(x))), None, changed=0)


@pytest.mark.parametrize("widths", [(8, 8, 8), (24, 8, 8), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_three_linears_of_one_input_join(widths: tuple[int, ...], bias: bool) -> None:
    def before(m: Any, x: Tensor) -> list[Tensor]:
        return [F.silu(linear(x)) for linear in (m.a, m.b, m.c)]

    def after(m: Any, x: Tensor) -> list[Tensor]:
        return [F.silu(part) for part in joined(m, x, m.a, m.b, m.c)]

    fused(Linears(before, widths, bias), Linears(after, widths, bias))


def test_batched_input() -> None:
    def before(m: Any, x: Tensor) -> Tensor:
        return F.silu(m.a(x)) * m.b(x)

    def after(m: Any, x: Tensor) -> Tensor:
        gate, up = joined(m, x, m.a, m.b)
        return F.silu(gate) * up

    fused(Linears(before), Linears(after), X.reshape(1, 5, 1, K).expand(2, 5, 3, K))


def test_two_groups_in_one_graph_join_apart() -> None:
    def before(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return F.silu(m.a(x)) * m.b(x) + m.c(y) * m.d(y)

    def after(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        gate, up = joined(m, x, m.a, m.b)
        left, right = joined(m, y, m.c, m.d)
        return F.silu(gate) * up + left * right

    fused(Linears(before, (8,) * 4), Linears(after, (8,) * 4), changed=2)


def test_a_value_that_something_else_reads_too() -> None:
    def before(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return m.a(y) * m.b(y) + y.sum()

    def after(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        left, right = joined(m, y, m.a, m.b)
        return left * right + y.sum()

    fused(Linears(before), Linears(after))


def test_cross_attention_joins_keys_and_values_only() -> None:
    class Cross(Linears):
        def forward(self, x: Tensor, memory: Tensor) -> Any:
            return self.compute(self, (x, memory))  # pyright: ignore[reportArgumentType]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q @ k.t(), dim=-1) @ v

    def before(m: Any, inputs: Any) -> Tensor:
        x, memory = inputs
        return attend(m.a(x), m.b(memory), m.c(memory))

    def after(m: Any, inputs: Any) -> Tensor:
        x, memory = inputs
        return attend(m.a(x), *joined(m, memory, m.b, m.c))

    memory = X[:3].flip(0)
    captured = annotated(Cross(before), X, memory)
    # Two products and a softmax stand behind the joined ones.
    check_pass(FuseSiblings(), captured, X, memory, changed=1, compare=within(8 * ATOL))
    assert_same_graph(captured.gm, capture(Cross(after), X, memory).gm)


def test_dynamic_batch_stays_symbolic() -> None:
    model = Linears(lambda m, x: F.silu(m.a(x)) * m.b(x))
    captured = annotated(model, X, dynamic=True)
    check_pass(FuseSiblings(), captured, *arguments_for(captured, X), changed=1, compare=within(ATOL))
    (wide,) = nodes_of(captured.gm, LINEAR)
    assert isinstance(value_of(wide).shape[0], torch.SymInt)
    more = torch.cat([X, X])
    (got,) = run(captured.gm, arguments_for(captured, more))
    torch.testing.assert_close(got, model(more), rtol=0, atol=ATOL)


def test_weights_that_are_expressions_join() -> None:
    """A LoRA sum whose operands come after the first sibling's readers: the expression is moved in front of it."""

    def before(m: Any, x: Tensor) -> Tensor:
        left = F.silu(m.a(x))
        return left * F.linear(x, m.b.weight + m.low_b @ m.low_a)

    def after(m: Any, x: Tensor) -> Tensor:
        weight = CAT([m.a.weight, m.b.weight + m.low_b @ m.low_a])
        left, right = SPLIT(F.linear(x, weight), [8, 8], -1)
        return F.silu(left) * right

    fused(Linears(before), Linears(after))


def test_the_note_of_the_wide_linear_names_all_its_sites() -> None:
    captured = annotated(Linears(lambda m, x: m.a(x) * m.b(x)), X)
    run_passes(captured.gm, [FuseSiblings()])
    (wide,) = nodes_of(captured.gm, LINEAR)
    note = note_of(wide)
    assert (note.paths, note.path, note.spec) == (("a", "b"), "{a,b}", PRESETS["int8dq"])
    assert note.made_by == ("fuse-siblings",)
    parts = [n for n in captured.gm.graph.nodes if n.args[:1] == (nodes_of(captured.gm, SPLIT)[0],)]
    assert [note_of(n).paths for n in parts] == [("a",), ("b",)]
    assert all(note_of(n).spec is None for n in parts)


# Where a slice can't stand for the whole.


def clones(captured: CapturedGraph) -> list[str]:
    return [note_of(node).path for node in nodes_of(captured.gm, CLONE)]


def test_a_slice_is_copied_for_a_view_that_cannot_take_strides() -> None:
    model = Linears(lambda m, x: m.a(x).view(-1).sum() + m.b(x).sum())
    captured = annotated(model, X)
    check_pass(FuseSiblings(), captured, X, changed=1, compare=within(80 * ATOL))  # a sum of 80 such products
    assert clones(captured) == ["a"]


def test_a_view_that_splits_the_features_needs_no_copy() -> None:
    model = Linears(lambda m, x: F.silu(m.a(x).view(5, 2, 4).transpose(0, 1)) + F.silu(m.b(x).view(2, 5, 4)))
    captured = annotated(model, X)
    check_pass(FuseSiblings(), captured, X, changed=1, compare=within(2 * ATOL))
    assert clones(captured) == ["b"]


def test_a_slice_that_leaves_the_graph_is_copied() -> None:
    """The caller gets the layout that the model has, and a kept key does not keep the wide result alive."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(m.a(x)), m.b(x), m.c(x).view(5, 2, 4).transpose(0, 1)

    captured = annotated(Linears(forward), X)
    wanted = [y.stride() for y in run(captured.gm, [X])]
    check_pass(FuseSiblings(), captured, X, changed=1, compare=within(ATOL))
    assert clones(captured) == ["b", "c"]
    assert [y.stride() for y in run(captured.gm, [X])] == wanted


# In-place calls, which torch.compile keeps.


def test_linears_with_a_write_to_their_input_between_them_stay_apart() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        left = m.a(h)
        h.mul_(3.0)
        return left + m.b(h)

    assert refused(Linears(forward)) == ("{a,b}", "the model writes to their input between them")


def test_a_write_through_a_view_counts() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        left = m.a(h)
        h[1:3] += 3.0
        return left + m.b(h)

    assert refused(Linears(forward)) == ("{a,b}", "the model writes to their input between them")


def test_a_write_to_something_else_does_not_count() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(x)
        left = m.a(h).relu_()
        return left + m.b(h)

    captured = annotated(Linears(forward), X)
    check_pass(FuseSiblings(), captured, X, changed=1, compare=within(2 * ATOL))


def test_a_call_that_only_writes_is_not_dead() -> None:
    """torch's dead code elimination takes a method call that nobody reads for dead."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        h.add_(1.0)
        return m.a(h) * m.b(h)

    captured = annotated(Linears(forward), X)
    check_pass(FuseSiblings(), captured, X, changed=1, compare=within(16 * ATOL))  # products of up to 2 * 4
    assert captured.gm.graph.find_nodes(op="call_method", target="add_")


# The other reasons.


def test_some_with_bias_and_some_without() -> None:
    model = Linears(lambda m, x: m.a(x) + m.b(x), bias=(True, False))
    assert refused(model) == ("{a,b}", "some of the linears have a bias and some have none")


def test_different_specs() -> None:
    where, reason = refused(Linears(lambda m, x: m.a(x) + m.b(x)), QuantConfig("int8dq", rules={"b": "int8wo"}))
    assert where == "{a,b}"
    assert reason == "the linears want different specs: w=int8/channel x=int8/token, w=int8/channel"


def test_siblings_of_one_that_stays_float_join_without_it() -> None:
    model = Linears(lambda m, x: m.a(x) * m.b(x) + m.c(x))
    captured = annotated(model, X, config=QuantConfig("int8dq", rules={"b": None}))
    check_pass(FuseSiblings(), captured, X, changed=1, compare=within(16 * ATOL))
    assert [note_of(n).paths for n in nodes_of(captured.gm, LINEAR)] == [("a", "c"), ("b",)]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("int8/channel1", "one scale for each input feature of a whole weight"),
        ("int8/block16x8", "blocks of 16 rows would hold rows of two weights"),
    ],
)
def test_scales_that_cannot_be_those_of_the_parts(weights: str, words: str) -> None:
    model = Linears(lambda m, x: m.a(x) + m.b(x))
    where, reason = refused(model, QuantConfig(weights=weights))
    assert where == "{a,b}"
    assert reason.startswith(words)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) + m.a(x) * m.b(x),
        lambda m, x: m.a(x) + m.b(x) * m.a(torch.relu(x)),
        lambda m, x: m.a(x) + m.b(x) * m.a.weight.sum(),
    ],
    ids=["one linear called twice", "again on another value", "read by something else"],
)
def test_tied_weights(forward: Forward) -> None:
    _, reason = refused(Linears(forward))
    assert reason == "a weight is used elsewhere too (tied or shared)"


def test_products_that_autocast_gives_different_dtypes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            left = m.a(x)
        return left + m.b(x)

    assert refused(Linears(forward)) == ("{a,b}", "the products differ in dtype (autocast)")


def test_inside_autocast_the_wide_product_has_the_dtype_of_its_parts() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (m.a(x) * m.b(x)).transpose(0, 1).softmax(-1)

    captured = annotated(Linears(forward), X)
    # Products of two bfloat16 values that may each round the other way, of size 4 at most: exp of 2 * 4 * 4 * 2**-8.
    check_pass(FuseSiblings(), captured, X, changed=1, compare=within(0, rtol=0.15))
    (wide,) = nodes_of(captured.gm, LINEAR)
    assert value_of(wide).dtype is torch.bfloat16
