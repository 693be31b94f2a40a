"""fuse-prologues: norms and gates go into the linears of the CPU that read them, or stay with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.annotation import note_of
from fxquant.graphs import CapturedGraph
from fxquant.lowering import select_kernels
from fxquant.passes import FuseEpilogues, FusePrologues
from fxquant.passes.around import operand_of
from fxquant.pipeline import kernel_pipeline
from fxquant.spec import QuantConfig
from fxquant.target import Target
from tests.lowering.helpers import CPU
from tests.passes.helpers import Forward, K, Linears, X, check_pass, nodes_of, staged, within
from tests.passes.test_fuse_norms import NORMS, ONE_CODE, Normed, llama

fx = torch.ops.fxquant
SQUARE = (K, K, K)
APART = QuantConfig("int8dq", fuse=False)
OPS = {
    "int8dq": fx.int8_linear_dynamic.default,
    "int8wo": fx.int8_linear_weight_only.default,
    "int4wo": fx.linear_weight_only.default,
    "int4dq": fx.linear_dynamic.default,
}


def lowered(model: nn.Module, x: Tensor = X, config: Any = "int8dq", **options: Any) -> CapturedGraph:
    captured = staged(model.to(x.dtype), x, config=config, **options)
    select_kernels(captured.gm, CPU)
    return captured


def linears(forward: Forward, x: Tensor = X, config: Any = "int8dq", **options: Any) -> CapturedGraph:
    return lowered(Linears(forward, widths=SQUARE), x, config, **options)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm(name: str, dtype: torch.dtype) -> None:
    norm, kind = NORMS[name]
    captured = lowered(Normed(norm), X.to(dtype))
    result = check_pass(FusePrologues(), captured, X.to(dtype), changed=1, compare=within(ONE_CODE))
    assert result.declined == []
    (made,) = nodes_of(captured.gm, fx.int8_linear_dynamic.default)
    assert operand_of(made, "prologue") == kind
    assert note_of(made).kernel == f"int8_linear_dynamic +{kind}"
    assert note_of(made).made_by[-1] == "fuse-prologues"
    assert "rsqrt" not in captured.gm.code
    assert "norm(" not in captured.gm.code


GATES: dict[str, Any] = {
    "relu_mul": F.relu,
    "silu_mul": F.silu,
    "gelu_mul": F.gelu,
    "gelu_tanh_mul": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("config", OPS)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gate(name: str, config: str, swapped: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate, up = GATES[name](m.a(x)), m.b(x)
        return m.c(up * gate if swapped else gate * up)

    captured = linears(forward, config=config)
    check_pass(FusePrologues(), captured, X, changed=1, compare=within(ONE_CODE))
    (made,) = [n for n in nodes_of(captured.gm, OPS[config]) if operand_of(n, "prologue")]
    assert operand_of(made, "prologue") == name
    assert not {"mul", "silu", "gelu", "relu"} & {n.name.split("_")[0] for n in captured.gm.graph.nodes}


def test_a_whole_layer_is_its_linears() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        n = m.normed(m, x)
        return x + m.c(F.silu(m.a(n)) * m.b(n))

    captured = lowered(Normed(llama, forward, widths=SQUARE))
    check_pass(FusePrologues(), captured, X, changed=2, compare=within(ONE_CODE))
    check_pass(FuseEpilogues(), captured, X, changed=1)
    names = [str(n.target) for n in captured.gm.graph.nodes if n.op == "call_function"]
    assert sorted(name for name in names if "getitem" not in name and "split" not in name) == sorted(
        ["fxquant.int8_pack.default", "fxquant.int8_linear_dynamic.default"] * 2
    )


@pytest.mark.parametrize("config", OPS)
def test_activation_and_residual_of_every_linear(config: str) -> None:
    captured = linears(lambda m, x: x + F.silu(m.a(x)), config=config)
    check_pass(FuseEpilogues(), captured, X, changed=2, compare=within(1e-5))
    (made,) = nodes_of(captured.gm, OPS[config])
    assert operand_of(made, "activation") == "silu"
    assert operand_of(made, "residual").op == "placeholder"


def test_activations_of_siblings_on_the_same_codes() -> None:
    captured = linears(lambda m, x: F.relu(m.a(x)) - F.gelu(m.b(x)), config=APART)
    check_pass(FuseEpilogues(), captured, X, changed=2, compare=within(1e-5))
    assert [n.kwargs for n in nodes_of(captured.gm, fx.int8_linear.default)] == [
        {"activation": "relu"},
        {"activation": "gelu"},
    ]


def test_dynamic_rows() -> None:
    captured = linears(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), dynamic=True)
    assert FusePrologues().run(captured.gm).changed == 1


def refused(model: nn.Module, words: str, config: Any = "int8dq") -> None:
    captured = lowered(model, config=config)
    result = check_pass(FusePrologues(), captured, X, changed=0)
    (declined,) = result.declined
    assert declined.reason == words
    assert declined.where.startswith("test_fuse_prologues.py:")


def test_a_result_with_other_readers() -> None:
    def post_norm(m: Any, x: Tensor) -> Tensor:
        n = F.rms_norm(x, (K,), m.weight)
        return m.a(n) + n

    refused(Normed(None, post_norm, widths=SQUARE), "rmsnorm: its result is read by add too")

    def gated(m: Any, x: Tensor) -> Tensor:
        h = F.silu(x) * x
        return m.a(h) + h

    refused(Linears(gated, widths=SQUARE), "silu_mul: its result is read by add too")

    def kept(m: Any, x: Tensor) -> Tensor:
        gate = F.silu(x)
        return m.a(gate * x) + gate

    refused(Linears(kept, widths=SQUARE), "silu_mul: its result is read by add too")


def test_gates_of_another_shape_or_dtype_or_in_place() -> None:
    words = "silu_mul: it makes shape [5, 16] of [5, 16] and [16]"
    refused(Linears(lambda m, x: m.a(F.silu(x) * m.table[0]), widths=SQUARE), words)
    words = "silu_mul: it makes torch.float32 of torch.float32 and torch.float16"
    refused(Linears(lambda m, x: m.a(F.silu(x) * x.half()), widths=SQUARE), words)
    words = "silu_mul: the model computes it in place"
    refused(Linears(lambda m, x: m.a(F.silu(torch.cos(x), inplace=True) * x), widths=SQUARE), words)


def test_what_the_model_writes_to() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        up = torch.cos(x)
        h = F.silu(x) * up
        up.mul_(2)
        return m.a(h) + up

    refused(Linears(between, widths=SQUARE), "silu_mul: the model writes to its input before the linear reads it")


def test_a_product_without_a_function_is_left() -> None:
    captured = linears(lambda m, x: m.a(x * x))
    assert check_pass(FusePrologues(), captured, X, changed=0).declined == []


def test_what_runs_where() -> None:
    config = QuantConfig("int8dq")
    names = ["fuse-gates", "fuse-prologues", "fuse-epilogues", "fuse-rotary", "fuse-attention", "share-operands"]
    assert [step.name for step in kernel_pipeline(config, CPU)] == names
    assert kernel_pipeline(APART, CPU) == ()
    assert kernel_pipeline(config, Target("cpu")) == ()  # without kernels
