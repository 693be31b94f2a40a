"""insert-qdq: the graph that computes the quantized model in reference arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.annotation import note_of
from fxquant.graphs import value_of
from fxquant.passes import InsertQdq
from fxquant.spec import PRESETS, QuantConfig
from tests.helpers import capture
from tests.models import sqnr
from tests.passes.helpers import (
    Linears,
    X,
    arguments_for,
    assert_same_graph,
    check_pass,
    nodes_of,
    quantized_activation,
    quantized_weight,
    run,
    staged,
)

LINEAR = torch.ops.aten.linear.default
fx = torch.ops.fxquant
# In dB, of 16 uniform features, 1 to 2 dB below what is measured in the worse of float32 and bfloat16 (where the
# product is rounded too).
SQNR = {
    "int8wo": 44.0, "int8dq": 41.5, "int4wo": 25.0, "int4wo-g32": 25.0, "int4dq": 25.5, "int2wo": 9.5,
    "fp8wo": 36.0, "fp8dq": 29.0, "fp8dqrow": 30.0, "fp6_e3m2": 25.0, "fp6_e2m3": 32.0, "fp5_e2m2": 25.0,
    "fp4_e2m1": 24.0, "mxfp8": 23.0, "mxfp8wo": 25.0, "mxfp6wo": 31.0, "mxfp4": 13.5, "mxfp4wo": 16.0,
    "nvfp4": 18.0, "nvfp4wo": 22.0,
}  # fmt: skip


def before(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.a(x))


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operands_stand_behind_codes(preset: str, dtype: torch.dtype) -> None:
    weights, activations = (side and str(side) for side in (PRESETS[preset].weights, PRESETS[preset].activations))
    assert weights is not None

    def after(m: Any, x: Tensor) -> Tensor:
        inner = quantized_activation(x, activations) if activations else x
        return F.relu(F.linear(inner, quantized_weight(m.a.weight, weights), m.a.bias))

    x = X.to(dtype)
    captured = staged(Linears(before, bias=True).to(dtype), x, config=preset, before="insert-qdq")

    def close(got: Any, wanted: Any) -> None:
        assert sqnr(got[0], wanted[0]) >= SQNR[preset]

    check_pass(InsertQdq(), captured, x, changed=1, compare=close)
    assert_same_graph(captured.gm, capture(Linears(after, bias=True).to(dtype), x).gm)


def test_a_product_without_spec_is_left_alone() -> None:
    config = QuantConfig("int8dq", rules={"a": None})
    captured = staged(Linears(before), X, config=config, before="insert-qdq")
    check_pass(InsertQdq(), captured, X, changed=0)


def test_siblings_that_were_not_joined_get_a_quantize_each() -> None:
    config = QuantConfig("int8dq", fuse=False)
    captured = staged(Linears(lambda m, x: m.a(x) + m.b(x)), X, config=config, before="share-quantize")
    assert len(nodes_of(captured.gm, fx.quantize_dynamic.default)) == 2


def test_activations_can_have_one_scale() -> None:
    config = QuantConfig(weights="int8/tensor", activations="int8/tensor")
    captured = staged(Linears(before), X, config=config, before="share-quantize")
    (quantize,) = nodes_of(captured.gm, fx.quantize_dynamic.default)
    assert [tuple(v.shape) for v in value_of(quantize)] == [(5, 16), (1, 1), (0,)]


def test_codes_keep_symbolic_sizes() -> None:
    captured = staged(Linears(before), X, before="share-quantize", dynamic=True)
    (quantize,) = nodes_of(captured.gm, fx.quantize_dynamic.default)
    codes, scale, _ = value_of(quantize)
    assert isinstance(codes.shape[0], torch.SymInt)
    assert str(codes.shape[0]) == str(scale.shape[0])
    more = torch.cat([X, X])
    (got,) = run(captured.gm, arguments_for(captured, more))
    assert got.shape == (10, 8)


def test_new_nodes_tell_their_story() -> None:
    captured = staged(Linears(before), X, before="share-quantize")
    (quantize,) = nodes_of(captured.gm, fx.quantize_dynamic.default)
    assert note_of(quantize).made_by == ("insert-qdq",)
    assert note_of(quantize).paths == ("a",)
    assert note_of(quantize).source.startswith("test_insert_qdq.py:")
