"""Convolutions on their way through the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import verify
from fxquant.annotation import note_of
from fxquant.folding import folded_constants
from fxquant.graphs import CapturedGraph, value_of
from fxquant.passes import Annotate, FoldWeights, FuseSiblings, InsertQdq, ShareQuantize, run_passes
from fxquant.products import CONVOLUTION
from fxquant.runner import Deciding
from fxquant.spec import PRESETS, Decision, QuantConfig
from tests.helpers import capture, reasons
from tests.passes.helpers import (
    Config,
    arguments_for,
    assert_same_graph,
    check_pass,
    nodes_of,
    quantized_activation,
    quantized_weight,
    run,
    staged,
)

fx, aten = torch.ops.fxquant, torch.ops.aten
IMAGES = torch.rand(3, 4, 9, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
Made = Callable[[], nn.Conv2d]
KINDS: dict[str, Made] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
}


class Convolutions(nn.Module):
    """Convolutions a and b of one kind, a linear, and what is done with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], make: Made = KINDS["plain"]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = make(), make()
        self.head = nn.Linear(6, 5)
        self.compute = forward

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def before(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.a(x))


def anything(got: Any, wanted: Any) -> None:
    """For passes that change the numbers."""


def stage(step: str, forward: Any = before, config: Config = "int8dq", **options: Any) -> CapturedGraph:
    x = options.pop("x", IMAGES)
    model = Convolutions(forward, options.pop("make", KINDS["plain"]))
    return staged(model, x, config=config, before=step, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["int8dq", "int8wo", "int4wo-g32", "mxfp4wo", "fp8dq", "nvfp4wo"])
def test_operands_stand_behind_codes(kind: str, preset: str) -> None:
    spec = QuantConfig(preset).spec_for("a", "conv").spec
    assert spec is not None
    weights, activations = str(spec.weights), spec.activations and str(spec.activations)
    given = nodes_of(stage("insert-qdq", make=KINDS[kind]).gm, CONVOLUTION)[0].args[3:]
    args = [list(a) if isinstance(a, list) else a for a in given]

    def after(m: Any, x: Tensor) -> Tensor:
        matrix = quantized_weight(aten.flatten.using_ints(m.a.weight, 1), weights)
        inner = quantized_activation(x, activations) if activations else x
        return F.relu(CONVOLUTION(inner, aten.view.default(matrix, list(m.a.weight.shape)), m.a.bias, *args))

    captured = stage("insert-qdq", config=preset, make=KINDS[kind])
    check_pass(InsertQdq(), captured, IMAGES, changed=1, compare=anything)
    assert_same_graph(captured.gm, capture(Convolutions(after, KINDS[kind]), IMAGES).gm)
    verify.quantized(captured.gm)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_folding_is_bit_equal(preset: str) -> None:
    captured = stage("fold-weights", config=preset)
    check_pass(FoldWeights(), captured, IMAGES, changed=1)
    assert not nodes_of(captured.gm, fx.quantize_weight.default)
    assert not nodes_of(captured.gm, aten.flatten.using_ints)
    (constant,) = set(folded_constants(captured.gm).values())
    assert constant.sources == ("a_weight",)
    verify.quantized(captured.gm)
    verify.lowered(captured.gm, strict=False)


def test_activations_per_token_are_per_sample() -> None:
    captured = stage("share-quantize")
    (quantize,) = nodes_of(captured.gm, fx.quantize_dynamic.default)
    assert quantize.args[1] == "int8/sample"
    assert tuple(value_of(quantize)[1].shape) == (3, 1, 1, 1)
    (site,) = nodes_of(captured.gm, CONVOLUTION)
    assert note_of(site).reason == "default; a convolution takes x=int8/token per sample"


def test_groups_run_along_the_flattened_rest() -> None:
    captured = stage("", config="w=int4/group8/affine")
    names = list(folded_constants(captured.gm))
    assert names == ["a_codes", "a_scale", "a_zero_point"]
    assert tuple(captured.gm.get_buffer("a_codes").shape) == (6, 36)
    assert tuple(captured.gm.get_buffer("a_scale").shape) == (6, 5)  # the last group has four of eight


def test_convolution_then_linear() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x).mean((2, 3)))

    captured = stage("", forward)
    verify.quantized(captured.gm)
    texts = [n.args[1] for n in nodes_of(captured.gm, fx.quantize_dynamic.default)]
    assert texts == ["int8/sample", "int8/token"]
    assert list(folded_constants(captured.gm)) == ["a_codes", "a_scale", "head_codes", "head_scale"]


def test_convolutions_of_one_value_share_its_codes_and_stay_apart() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + m.b(x)

    captured = stage("fuse-siblings", forward)
    check_pass(FuseSiblings(), captured, IMAGES, changed=0)
    captured = stage("share-quantize", forward)
    check_pass(ShareQuantize(), captured, IMAGES, changed=1)
    assert len(nodes_of(captured.gm, fx.quantize_dynamic.default)) == 1


def test_a_convolution_called_twice_has_one_weight() -> None:
    captured = stage("share-quantize", lambda m, x: m.a(x) + m.a(torch.relu(x)))
    check_pass(ShareQuantize(), captured, IMAGES, changed=1)
    assert len(nodes_of(captured.gm, fx.quantize_weight.default)) == 1
    assert len(nodes_of(captured.gm, aten.flatten.using_ints)) == 1
    check_pass(FoldWeights(), captured, IMAGES, changed=1)


def test_symbolic_sizes_stay() -> None:
    captured = stage("", dynamic=True)
    more = torch.cat([IMAGES, IMAGES])[..., :7]
    (got,) = run(captured.gm, arguments_for(captured, more))
    (wanted,) = run(stage("", x=more).gm, [more])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("preset", ["int8dq", "int4wo"])
def test_channels_last_weights_keep_the_layout_of_the_result(preset: str) -> None:
    """The codes of a weight are rows; the model's own next op may want to view what its convolution gave."""
    model = Convolutions(lambda m, x: m.a(x).permute(0, 2, 3, 1).view(3, -1)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    captured = staged(model, IMAGES, config=preset, before="insert-qdq")
    strides = value_of(nodes_of(captured.gm, CONVOLUTION)[0]).stride()
    check_pass(InsertQdq(), captured, IMAGES, changed=1, compare=anything)
    (site,) = nodes_of(captured.gm, CONVOLUTION)
    assert any(value_of(n).stride() == strides for n in (site, *site.users))


@pytest.mark.parametrize("preset", ["int8dq", "int8wo"])
def test_under_autocast_the_parameter_is_quantized_and_decodes_narrow(preset: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.a(x)

    captured = stage("insert-qdq", forward, preset)
    check_pass(InsertQdq(), captured, IMAGES, changed=1, compare=anything)
    (quantize,) = nodes_of(captured.gm, fx.quantize_weight.default)
    assert value_of(quantize.all_input_nodes[0]).dtype is torch.float32
    (site,) = nodes_of(captured.gm, CONVOLUTION)
    assert [value_of(n).dtype for n in (*site.all_input_nodes, site)] == [torch.bfloat16] * 4
    run_passes(captured.gm, [ShareQuantize()])
    check_pass(FoldWeights(), captured, IMAGES, changed=2)  # codes, and the bias in bfloat16


def writes(m: Any, x: Tensor) -> Tensor:
    m.a.weight.mul_(0.5)
    return m.a(x)


def test_rules_and_conditions_say_why_it_stays() -> None:
    captured = capture(Convolutions(before), IMAGES)
    config = QuantConfig("int8dq", rules={"a": None})
    declined = check_pass(Annotate(Deciding(config)), captured.copy(), IMAGES, changed=0).declined
    assert [(d.where, d.reason) for d in declined] == [("a", 'rule "a=none"')]
    config = QuantConfig("w=int8/channel2")
    declined = check_pass(Annotate(Deciding(config)), captured.copy(), IMAGES, changed=0).declined
    assert declined[0].reason.startswith("the weight cannot be int8/channel2: granularity channel2 needs an axis 2")
    assert reasons(capture(Convolutions(writes), IMAGES)) == ["the model writes to the weight while it runs"]


def test_annotate_asks_for_the_kind() -> None:
    def decide(paths: tuple[str, ...], kind: str) -> Decision:
        return Decision(None, f"{kind} {paths[0]}")

    captured = capture(Convolutions(lambda m, x: m.head(m.a(x).mean((2, 3)))), IMAGES)
    declined = run_passes(captured.gm, [Annotate(decide)])["annotate"].declined
    assert [d.reason for d in declined] == ["conv a", "linear head"]
