"""No lowering ever emits an op that is slow or wrong on some machines: by the graph, by what runs, by Inductor's code.

oneDNN's qlinear with signed activations and torch's `_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu` are scalar
references on CPUs without AMX; qlinear with scales as tensors crashes under max-autotune.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.graphs import target_name
from fxquant.pipeline import quantize_graph
from fxquant.runner import Deciding
from fxquant.spec import PRESETS, QuantConfig
from fxquant.weights import WeightStore
from tests.lowering.helpers import CPU, NO_KERNEL, arguments_of
from tests.models import DecoderLayer, sqnr
from tests.test_stages_agree import MODELS, captured_calls

TRAPS = ("qlinear", "_weight_int8pack_mm", "_weight_int4pack_mm", "int_mm", "scaled_mm")


def assert_no_trap(words: list[str]) -> None:
    assert words
    assert not [word for word in words if any(trap in word for trap in TRAPS)]


class Called(TorchDispatchMode):
    """Notes every op that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.words.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", [CPU, NO_KERNEL], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("name", MODELS)
def test_no_preset_emits_one_on_any_model(name: str, target: Any) -> None:
    make, inputs_for = MODELS[name]
    captured, (args,) = captured_calls(make().eval(), [list(inputs_for(2))])
    for preset in PRESETS:
        config = QuantConfig(preset)
        lowered = quantize_graph(captured.copy(), config, Deciding(config), target=target, evaluate=False)
        assert_no_trap([target_name(n) for n in lowered.gm.graph.nodes if n.op.startswith("call_")])
        values = arguments_of(lowered.binding, args, WeightStore())
        with torch.no_grad(), Called() as called:
            lowered.gm(*values)
        assert_no_trap(called.words)
        ours = {word for word in called.words if word.startswith("fxquant.")}
        assert ours, "nothing quantized has run"


class Everything(nn.Module):
    """A decoder layer whose linears have a preset each, behind a branch that Dynamo keeps in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = DecoderLayer(64, 4, 2, 96)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return self.layer(x)


RULES = {
    "*.k_proj": "int8wo",
    "*.v_proj": "int8wo",
    "*.o_proj": "int4wo-g32",
    "*.up_proj": "fp8wo",
    "*.down_proj": "w=int8/tensor x=int8/token",
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
def test_inductor_does_not_make_one_out_of_what_it_gets() -> None:
    """Inductor has patterns of its own for quantized products. It runs the graph with dynamic sizes, too."""
    torch.manual_seed(0)
    model = Everything().eval()
    x = torch.randn(2, 8, 64)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.reset()
    with torch.no_grad(), inductor_config.patch(fx_graph_cache=False):
        eager = fxquant.compile(model, QuantConfig("int8dq", rules=RULES, executor="eager"), fullgraph=True)
        wanted = eager(x)
        torch._dynamo.reset()
        compiled = fxquant.compile(model, QuantConfig("int8dq", rules=RULES), fullgraph=True)
        got, code = run_and_get_code(compiled, x)
        more = torch.randn(3, 8, 64)
        assert sqnr(compiled(more), eager(more)) >= 60  # a code that rounds the other way costs about that much
    assert sqnr(got, wanted) >= 60
    assert len(code) == 1
    (written,) = code
    assert_no_trap(written.splitlines())
    for op in ("int8_linear_dynamic", "int8_linear_weight_only", "linear_weight_only"):
        assert f"fxquant.{op}" in written
