"""Every stage of the pipeline runs, and agrees with the one before as far as it promises to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.annotation import PassResult
from fxquant.capture import from_dynamo
from fxquant.graphs import CapturedGraph
from fxquant.pipeline import Lowered, quantize_graph
from fxquant.runner import Deciding
from fxquant.spec import QuantConfig
from fxquant.target import Target
from fxquant.weights import WeightStore
from tests.helpers import run_captured
from tests.lowering.helpers import CPU, arguments_of
from tests.models import AttentionBlock, Decoder, GatedMlp, VisionEncoder, sqnr
from tests.passes.helpers import run
from tests.site_bounds import Call, SiteRecorder, assert_site_within_bound

PRESETS = ("int8dq", "int8wo", "int4wo", "fp8wo")


class SelfAndCross(nn.Module):
    """nn.MultiheadAttention of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.cross(x, memory, memory, need_weights=False)[0]


class Conv1dStyle(nn.Module):
    """Weights stored [in, out] and used through addmm on flattened rows, as GPT-2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.b_in = nn.Parameter(torch.randn(32, 96) * 0.2), nn.Parameter(torch.randn(96) * 0.1)
        self.w_out, self.b_out = nn.Parameter(torch.randn(32, 32) * 0.2), nn.Parameter(torch.randn(32) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 32)
        a, b, c = torch.addmm(self.b_in, flat, self.w_in).split(32, dim=-1)
        return torch.addmm(self.b_out, torch.tanh(a) * b + c, self.w_out).view(x.shape)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(5))


# Name: the model, and its inputs for a batch of that size.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "attention": (lambda: AttentionBlock(32, 4, 2), lambda batch: (rows(batch, 6, 32),)),
    "gated mlp": (lambda: GatedMlp(32, 48), lambda batch: (rows(batch, 3, 32),)),
    "decoder": (lambda: Decoder(32, 1, 4, 2, 48, 20), lambda batch: (ids(batch, 6),)),
    "vit": (lambda: VisionEncoder(32, 1), lambda batch: (rows(batch, 3, 32, 32),)),
    "mha": (SelfAndCross, lambda batch: (rows(batch, 5, 32), rows(batch, 7, 24))),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 48, batch_first=True),
        lambda batch: (rows(batch, 6, 32),),
    ),
    "conv1d": (Conv1dStyle, lambda batch: (rows(batch, 6, 32),)),
}


@dataclass
class Stages:
    """The output of every stage on the same inputs; of the last one, also each site's inputs and output."""

    outputs: dict[str, list[Tensor]]
    lowered: Lowered
    sites: list[tuple[Node, Call, Tensor]]


def captured_calls(
    model: nn.Module, batches: list[list[Tensor]], dynamic: bool | None = False
) -> tuple[CapturedGraph, list[list[Any]]]:
    """The model's one graph, and the flat arguments that Dynamo calls it with for each batch.

    With dynamic shapes there are more of them than the model has inputs: sizes, and the floats of its modules.
    """
    graphs: list[CapturedGraph] = []
    calls: list[list[Any]] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(from_dynamo(gm, example_inputs))

        def call(*args: Any) -> Any:
            calls.append(list(args))
            return run_captured(graphs[0], args)

        return call

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for batch in batches:
            compiled(*batch)
    (captured,) = graphs
    return captured, calls


def run_stages(captured: CapturedGraph, preset: str | QuantConfig, args: list[Any], target: Target = CPU) -> Stages:
    """Every stage on the captured graph's flat arguments `args`."""
    outputs: dict[str, list[Tensor]] = {}
    inputs = [args[position] for position in captured.inputs]

    def observe(stage: str, gm: GraphModule, result: PassResult | None) -> None:
        if stage != "lower":  # that one is called with packed weights
            outputs[stage] = list(run(gm, inputs))

    config = preset if isinstance(preset, QuantConfig) else QuantConfig(preset)
    lowered = quantize_graph(captured.copy(), config, Deciding(config), target=target, observe=observe)
    recorder = SiteRecorder(lowered.gm)
    values = arguments_of(lowered.binding, args, WeightStore())
    with torch.no_grad():
        outputs["lower"] = list(recorder.run(*values, enable_io_processing=False))
    return Stages(outputs, lowered, recorder.sites)


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Relative error in the Frobenius norm, the largest of all outputs."""
    pairs = zip(got, want, strict=True)
    return max(float((g.double() - w.double()).norm() / w.double().norm()) for g, w in pairs)


def noise(got: list[Tensor], want: list[Tensor]) -> float:
    """SQNR in dB, the lowest of all outputs."""
    return min(sqnr(g, w) for g, w in zip(got, want, strict=True))


def same_bits(stages: Stages, one: str, other: str) -> None:
    for a, b in zip(stages.outputs[one], stages.outputs[other], strict=True):
        assert torch.equal(a, b), f"{other} is not bit-equal to {one}"


# In dB against the float model, over all models and dtypes. Measured, q/dq graph and lowered one: int8dq 34.5 to 51.9,
# int8wo 36.8 to 56.3, int4wo 14.3 to 32.1 (K is 24 to 48, so a group is a whole row), fp8wo 26.7 to 40.7; the lowest is
# always the ViT, whose patches are a convolution. Asserted: two dB below the lowest.
SQNR = {"int8dq": 32.4, "int8wo": 34.8, "int4wo": 12.3, "fp8wo": 24.7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_stages_agree(name: str, dtype: torch.dtype) -> None:
    check_stages(name, dtype, dynamic=False)


# With dynamic=True Dynamo does not know that torch's fused encoder layer fixes the width of its input; capture leaves
# attention of unknown width as it is.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "encoder layer"])
def test_stages_agree_with_dynamic_shapes(name: str) -> None:
    check_stages(name, torch.float32, dynamic=True)


@pytest.mark.parametrize("name", ["encoder layer", "vit"])
def test_stages_agree_with_a_dynamic_batch(name: str) -> None:
    check_stages(name, torch.float32, dynamic=None)


def check_stages(name: str, dtype: torch.dtype, *, dynamic: bool | None) -> None:
    """`dynamic` as torch.compile takes it; with None the batch is marked as dynamic."""
    make, inputs_for = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().to(dtype)
    sizes = (2,) if dynamic is False else (2, 3)
    batches = [[x.to(dtype) if x.is_floating_point() else x for x in inputs_for(size)] for size in sizes]
    if dynamic is None:
        for x in batches[0]:
            torch._dynamo.mark_dynamic(x, 0)
    captured, calls = captured_calls(model, batches, dynamic)
    for preset in PRESETS:
        for args in calls:
            assert_stages_agree(run_stages(captured, preset, args), preset, dtype)


def assert_stages_agree(stages: Stages, preset: str, dtype: torch.dtype) -> None:
    out = stages.outputs
    same_bits(stages, "capture", "annotate")
    # Joined products are summed in another order. Measured at most 1.83 eps (float32) and 0 (half precision).
    assert distance(out["fuse-siblings"], out["annotate"]) <= 8 * torch.finfo(dtype).eps
    same_bits(stages, "insert-qdq", "share-quantize")
    same_bits(stages, "share-quantize", "fold-weights")
    assert stages.sites
    for node, call, got in stages.sites:
        assert_site_within_bound(node, call, got)
    # In float32 both compute the same model, up to the order of sums: measured at least 128 dB. In half precision the
    # reference rounds the dequantized operands, which the kernels don't: both are judged by the float model.
    if dtype is torch.float32:
        assert noise(out["lower"], out["fold-weights"]) >= 115
    assert noise(out["fold-weights"], out["capture"]) >= SQNR[preset]
    assert noise(out["lower"], out["capture"]) >= SQNR[preset]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("width", [64, 128, 256, 576, 1024])
def test_int8dq_keeps_37_db_on_random_attention_blocks(width: int, kv_heads: int) -> None:
    """Measured, the lowest of three seeds: 38.8, 38.6, 38.2, 38.0, 37.6 dB."""
    worst = math.inf
    for seed in range(3):
        torch.manual_seed(seed)
        model = AttentionBlock(width, 4, kv_heads).eval()
        captured, calls = captured_calls(model, [[torch.randn(2, 16, width)]])
        stages = run_stages(captured, "int8dq", calls[0])
        worst = min(worst, noise(stages.outputs["lower"], stages.outputs["capture"]))
    assert worst >= 37
