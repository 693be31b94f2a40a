"""The pipeline for GPUs: every stage runs on the CPU, by the ops' references, and agrees with the one before."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fxquant.graphs import CapturedGraph
from fxquant.lowering import to_inductor
from fxquant.pipeline import quantize_graph
from fxquant.runner import Deciding
from fxquant.spec import QuantConfig
from fxquant.target import Target
from fxquant.weights import WeightStore
from tests.lowering.helpers import CPU, arguments_of, targets
from tests.test_stages_agree import MODELS, captured_calls, noise, run_stages, same_bits

SM90 = Target("cuda", arch="sm90")
SM80 = Target("cuda", arch="sm80")
PRESETS = ("int8wo", "int4wo", "int8dq", "fp8dqrow", "mxfp4")
# In dB, in float32, one stage against another that computes the same up to the order of sums. Measured: 137 and more.
SAME = 115


@functools.cache
def calls_of(name: str, dynamic: bool = False) -> tuple[CapturedGraph, list[list[Any]]]:
    make, inputs_for = MODELS[name]
    torch.manual_seed(0)
    batches = [list(inputs_for(size)) for size in ((2, 3) if dynamic else (2,))]
    return captured_calls(make().eval(), batches, dynamic)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["decoder", "encoder layer"])
def test_stages_agree(name: str, preset: str) -> None:
    captured, (args,) = calls_of(name)
    for target in (SM90, SM80):
        stages = run_stages(captured, preset, args, target)
        out = stages.outputs
        same_bits(stages, "share-quantize", "fold-weights")
        assert noise(out["fuse-epilogues"], out["fold-weights"]) >= SAME
        assert noise(out["fuse-norms"], out["fold-weights"]) >= SAME
        same_bits(stages, "fuse-norms", "lower")


def test_the_numbers_are_those_of_the_cpu() -> None:
    captured, (args,) = calls_of("decoder")
    for preset in ("int8wo", "int4wo", "int8dq"):
        ours, cpus = (run_stages(captured, preset, args, target).outputs["lower"] for target in (SM90, CPU))
        assert noise(ours, cpus) >= SAME


def test_without_fusion_every_operation_of_the_model_stays() -> None:
    captured, (args,) = calls_of("decoder")
    stages = run_stages(captured, QuantConfig("int8dq", fuse=False), args, SM90)
    assert "fuse-epilogues" not in stages.outputs
    assert "norm_quantize" not in targets(stages.lowered.gm)
    assert noise(stages.outputs["lower"], stages.outputs["fold-weights"]) >= SAME


def test_a_decoder_gets_all_fusions() -> None:
    captured, (args,) = calls_of("decoder")
    lowered = run_stages(captured, "int8dq", args, SM90).lowered
    assert targets(lowered.gm).count("norm_quantize") == 3  # two of the layer, and the one before the head
    kernels = [site.kernel for site in lowered.report.sites]
    assert sum(kernel.endswith("+residual") for kernel in kernels) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
def test_inductor_compiles_it_with_dynamic_shapes() -> None:
    """One compiled graph for every batch; between the ops Inductor's own kernels run."""
    captured, calls = calls_of("gated mlp", dynamic=True)
    config = QuantConfig("int8dq")
    lowered = quantize_graph(captured.copy(), config, Deciding(config), target=SM90, evaluate=False)
    compiled = to_inductor(lowered.gm)
    for args in calls:
        values = arguments_of(lowered.binding, args, WeightStore())
        with torch.no_grad():
            for got, want in zip(compiled(*values), lowered.gm(*values), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
