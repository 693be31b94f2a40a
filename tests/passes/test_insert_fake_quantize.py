"""insert-fake-quantize: operands are rounded in the graph, once for each value, and what modules round is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import verify
from fxquant.annotation import note_of
from fxquant.errors import VerificationFailed
from fxquant.graphs import CapturedGraph
from fxquant.passes import InsertFakeQuantize, ShareQuantize, run_passes
from fxquant.pipeline import training_pipeline
from fxquant.runner import Deciding
from fxquant.spec import PRESETS, QuantConfig
from tests.helpers import capture
from tests.models import sqnr
from tests.passes.helpers import Linears, X, assert_same_graph, check_pass, nodes_of, run, staged

fx = torch.ops.fxquant
LINEAR = torch.ops.aten.linear.default


def annotated(model: nn.Module, *inputs: Any, config: QuantConfig | str = "int8dq") -> CapturedGraph:
    captured = capture(model, *inputs)
    config = QuantConfig(config) if isinstance(config, str) else config
    run_passes(captured.gm, training_pipeline(Deciding(config))[:1])
    return captured


def roughly(got: Any, wanted: Any) -> None:
    assert sqnr(got[0], wanted[0]) > 9.0


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_both_operands_are_rounded_to_what_inference_computes_with(preset: str) -> None:
    spec = PRESETS[preset]

    def before(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.a(x))

    def after(m: Any, x: Tensor) -> Tensor:
        x = x if spec.activations is None else fx.fake_quantize.default(x, str(spec.activations))
        return F.relu(F.linear(x, fx.fake_quantize_weight.default(m.a.weight, str(spec.weights)), m.a.bias))

    captured = annotated(Linears(before, bias=True), X, config=preset)
    check_pass(InsertFakeQuantize(), captured, X, changed=1, compare=roughly)
    verify.trainable(captured.gm)
    assert_same_graph(captured.gm, capture(Linears(after, bias=True), X).gm)
    inference = staged(Linears(before, bias=True), X, config=preset, before="share-quantize")
    assert torch.equal(run(captured.gm, [X])[0], run(inference.gm, [X])[0])


def test_an_algorithm_is_named() -> None:
    captured = annotated(Linears(lambda m, x: m.a(x)), X, config="int4wo-g32 algorithm=mse")
    check_pass(InsertFakeQuantize(), captured, X, changed=1, compare=roughly)
    (rounded,) = nodes_of(captured.gm, fx.fake_quantize_weight.default)
    assert rounded.args[1:] == ("int4/group32/affine/bf16", "mse")


@pytest.mark.parametrize("written", [False, True])
def test_a_value_that_several_products_read_is_rounded_once(written: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * 1.0
        y = m.a(x)
        if written:
            x.add_(1.0)
        return y + m.b(x) + m.a(x)

    captured = annotated(Linears(forward), X)
    run_passes(captured.gm, [InsertFakeQuantize()])
    shared = check_pass(ShareQuantize(), captured, X).changed
    assert (len(nodes_of(captured.gm, fx.fake_quantize.default)), shared) == ((2, 1) if written else (1, 3))


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.table = nn.Embedding(12, 16)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(images), self.table(ids)


def test_convolutions_and_tables() -> None:
    images, ids = torch.randn(2, 4, 7, 7), torch.arange(5)
    config = QuantConfig("int8dq", embeddings="int4/group16")
    captured = annotated(Convolving(), images, ids, config=config)
    check_pass(InsertFakeQuantize(), captured, images, ids, changed=2, compare=lambda got, wanted: None)
    specs = [str(node.args[1]) for node in nodes_of(captured.gm, fx.fake_quantize_weight.default)]
    assert sorted(specs) == ["int4/group16", "int8/channel"]
    assert [n.args[1] for n in nodes_of(captured.gm, fx.fake_quantize.default)] == ["int8/sample"]


def test_under_autocast_the_parameter_is_rounded_and_its_dtype_cast() -> None:
    model, images = Convolving(), torch.randn(2, 4, 7, 7)

    def forward(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.conv(images)

    captured = capture(forward, images)
    run_passes(captured.gm, training_pipeline(Deciding(QuantConfig("int8wo"))))
    (rounded,) = nodes_of(captured.gm, fx.fake_quantize_weight.default)
    assert rounded.all_input_nodes[0].op == "get_attr"
    want = F.conv2d(
        images.bfloat16(),
        fx.fake_quantize_weight(model.conv.weight, "int8/channel").bfloat16(),
        model.conv.bias.bfloat16(),  # pyright: ignore[reportOptionalMemberAccess]
        padding=1,
        groups=2,
    )
    assert torch.equal(run(captured.gm, [images])[0], want)


def test_what_a_rule_leaves_float_stays_so() -> None:
    captured = annotated(Linears(lambda m, x: m.a(x)), X, config=QuantConfig("int8dq", rules={"a": None}))
    check_pass(InsertFakeQuantize(), captured, X, changed=0)
    verify.trainable(captured.gm)


def test_a_quantized_module_is_left_and_its_spec_noted() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    fxquant.quantize(model, weights="int4/group16", activations="int8")
    captured = annotated(model, X)
    result = check_pass(InsertFakeQuantize(), captured, X, changed=0)
    (product,) = nodes_of(captured.gm, LINEAR)
    assert str(note_of(product).spec) == "w=int4/group16 x=int8/token"
    (row,) = result.declined
    assert (row.where, row.reason) == ("0", "quantized by the model door: trained as it is")
    verify.trainable(captured.gm)


def test_the_check_of_the_stage_names_what_is_not_rounded() -> None:
    captured = annotated(Linears(lambda m, x: m.a(x)), X)
    with pytest.raises(VerificationFailed, match="its weight should be rounded to int8/channel, but it is not rounded"):
        verify.trainable(captured.gm)
    run_passes(captured.gm, [InsertFakeQuantize()])
    (product,) = nodes_of(captured.gm, LINEAR)
    (rounded,) = nodes_of(captured.gm, fx.fake_quantize.default)
    product.update_arg(0, rounded.all_input_nodes[0])
    captured.gm.graph.erase_node(rounded)
    with pytest.raises(VerificationFailed, match="its activation should be int8/token, but it is float"):
        verify.trainable(captured.gm)
