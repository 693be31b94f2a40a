"""Joining linears changes no number: for every preset, every granularity and every algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.folding import folded_constants
from fxquant.graphs import CapturedGraph, value_of
from fxquant.passes import FoldWeights, InsertQdq
from fxquant.spec import PRESETS, QuantConfig, linear_spec
from tests.passes.helpers import K, Linears, X, check_pass, nodes_of, quantized_weight, run, staged

fx = torch.ops.fxquant
WIDTHS = (5, 3, 8)
SPECS = [
    *sorted(PRESETS),
    "w=int8/tensor x=int8/token",
    "w=int4/tensor/affine",
    "w=int3/tensor/shift",
    "w=int8/tensor/bf16",
    "w=int4/group5/affine",
    "w=int4/group64/shift/bf16",
    "w=int4/group8/affine algorithm=hqq",
    "w=int4/channel algorithm=mse",
    "w=int8/block1x4",
]


def siblings(fuse: bool, spec: str) -> CapturedGraph:
    model = Linears(lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], -1), WIDTHS)
    with torch.no_grad():
        for factor, name in zip((1.0, 100.0, 0.01), "abc", strict=True):  # so that a scale of all three would be seen
            model.get_parameter(f"{name}.weight").mul_(factor)
    return staged(model, X, config=QuantConfig(spec, fuse=fuse), before="fold-weights")


def decoded_weights(captured: CapturedGraph) -> Tensor:
    """What the products multiply with, one weight below the other."""
    found = [n for n in nodes_of(captured.gm, fx.dequantize.default) if n.args[0] in _constants(captured)]
    (output,) = captured.gm.graph.find_nodes(op="output")
    output.args = (tuple(found),)
    captured.gm.recompile()
    return torch.cat(run(captured.gm, [X]))


def _constants(captured: CapturedGraph) -> set[torch.fx.Node]:
    return {n for n in captured.gm.graph.nodes if value_of(n) is not None and X not in n.all_input_nodes} - {
        user for n in nodes_of(captured.gm, fx.quantize_dynamic.default) for user in n.users
    }


@pytest.mark.parametrize("spec", SPECS)
def test_joined_weights_are_those_of_the_separate_linears(spec: str) -> None:
    together, apart = siblings(True, spec), siblings(False, spec)
    assert len(nodes_of(together.gm, torch.ops.aten.linear.default)) == 1
    assert len(nodes_of(apart.gm, torch.ops.aten.linear.default)) == 3
    assert torch.equal(decoded_weights(together), decoded_weights(apart))


@pytest.mark.parametrize("spec", SPECS)
def test_joined_weights_fold_to_the_bits_that_they_had(spec: str) -> None:
    captured = siblings(True, spec)
    check_pass(FoldWeights(), captured, X, changed=1)
    assert not nodes_of(captured.gm, fx.quantize_weight.default)
    assert not nodes_of(captured.gm, torch.ops.aten.expand.default)
    (constant,) = set(folded_constants(captured.gm).values())
    assert len(constant.sources) == 3


def test_a_scale_of_a_whole_weight_is_repeated_for_its_rows() -> None:
    captured = siblings(True, "w=int8/tensor")
    (dequantize,) = nodes_of(captured.gm, fx.dequantize.default)
    codes, scale = (value_of(n) for n in dequantize.args[:2])  # pyright: ignore[reportArgumentType]
    assert (tuple(codes.shape), tuple(scale.shape)) == ((16, K), (16, 1))
    assert len(nodes_of(captured.gm, fx.quantize_weight.default)) == 3


def test_the_tensor_scale_of_nvfp4_is_repeated_for_its_rows() -> None:
    captured = siblings(True, "nvfp4wo")
    (dequantize,) = nodes_of(captured.gm, fx.dequantize.default)
    tensor_scale = dequantize.args[5]
    assert isinstance(tensor_scale, torch.fx.Node)
    assert tuple(value_of(tensor_scale).shape) == (16, 1)
    FoldWeights().run(captured.gm)
    (constant,) = set(folded_constants(captured.gm).values())
    assert constant.names == ("a_b_c_codes", "a_b_c_scale", "a_b_c_tensor_scale")


def test_rows_of_their_own_are_quantized_in_one_go() -> None:
    assert len(nodes_of(siblings(True, "int4wo").gm, fx.quantize_weight.default)) == 1


def test_a_weight_that_the_model_joined_itself_is_one_weight() -> None:
    """Its scale is that of the whole, as the model wrote it."""

    def forward(m: Linears, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, torch.cat([m.get_parameter("a.weight"), m.get_parameter("b.weight")]))

    captured = staged(Linears(forward), X, config=QuantConfig("w=int8/tensor"), before="insert-qdq")
    check_pass(InsertQdq(), captured, X, changed=1, compare=lambda got, wanted: None)
    (quantize,) = nodes_of(captured.gm, fx.quantize_weight.default)
    wanted = quantized_weight(torch.cat([getattr(captured.gm, f"{n}_weight") for n in "ab"]).detach(), "int8/tensor")
    assert torch.equal(decoded_weights(captured), wanted)
    assert linear_spec("w=int8/tensor") is not None
    assert quantize.args[1] == "int8/tensor"
