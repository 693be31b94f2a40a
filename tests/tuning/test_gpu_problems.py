"""GPU problems without a GPU: of calls, of graphs, of models; operands and checks of answers; the model's choice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.annotation import note_of
from fxquant.lowering import select_kernels
from fxquant.lowering.calls import problem_of_call
from fxquant.lowering.tuned import calls_of, use_tuned
from fxquant.ops.gpu import config_for, forget_plans
from fxquant.target import Plan, Problem, Target, arch_named
from fxquant.target.config import kernel_id
from fxquant.triton_kernels import KERNELS, kernels_for
from fxquant.triton_kernels.operands import QuantizeOperands
from fxquant.tuning import Entry, caches_of, lookup
from fxquant.tuning.measuring.checking import _number
from fxquant.tuning.measuring.gpu import prepared
from tests.passes.helpers import staged
from tests.tuning.fakes import FakeFacts

SM90 = Target("cuda", arch="sm90")
CPU = torch.device("cpu")
TOKEN, INT4 = "int8/token", "int4/group32/affine/bf16"
OPS = torch.ops.fxquant


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: the last configuration of a kernel is the fastest by the model."""
    numbers: dict[Any, int] = {}

    def seconds(problem: Problem, config: Any, arch: Any, facts: Any) -> SimpleNamespace:
        return SimpleNamespace(seconds=1.0 / (1 + numbers.setdefault((problem, config), len(numbers))))

    monkeypatch.setattr("fxquant.tuning.facts.facts_of", lambda *args: FakeFacts())
    monkeypatch.setattr("fxquant.tuning.model.modelled_time", seconds)


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        (
            "tiled_linear",
            {"x": torch.empty(2, 3, 64, dtype=torch.float16), "tiles": torch.empty(32, 1), "in_features": 64,
             "spec": INT4, "dtype": torch.float16},
            Problem("linear", 6, 32, 64, INT4, "", "float16"),
        ),
        (
            "tiled_linear",
            {"x": torch.empty(3, 64), "tiles": torch.empty(32, 1), "in_features": 64, "spec": INT4,
             "dtype": torch.float16},
            Problem("linear", 3, 32, 64, INT4, "", "float32"),
        ),
        (
            "tiled_linear_codes",
            {"codes": torch.empty(3, 64), "x_spec": TOKEN, "tiles": torch.empty(32, 1), "in_features": 64,
             "spec": "int8/channel", "dtype": torch.bfloat16},
            Problem("linear", 3, 32, 64, "int8/channel", TOKEN, "bfloat16"),
        ),
        ("int8_quantize_per_token", {"x": torch.empty(3, 64)}, Problem("quantize", 3, 0, 64, "", TOKEN, "float32")),
        (
            "quantize_dynamic",
            {"x": torch.empty(2, 4, 5, 5), "spec": "int8/sample"},
            Problem("quantize", 2, 0, 100, "", TOKEN, "float32"),
        ),
        (
            "norm_quantize",
            {"x": torch.empty(3, 64), "norm": "rmsnorm", "spec": TOKEN},
            Problem("quantize", 3, 0, 64, "", TOKEN, "float32", "rmsnorm"),
        ),
        (
            "quantize_static",
            {"x": torch.empty(3, 64), "scale": torch.ones(1), "spec": "int8/tensor"},
            Problem("quantize", 3, 0, 64, "", "int8/tensor", "float32", "static"),
        ),
        (
            "embedding_dequantize",
            {"indices": torch.empty(2, 3), "rows": torch.empty(100, 8), "embedding_dim": 16, "spec": INT4,
             "dtype": torch.float32},
            Problem("embedding", 6, 100, 16, INT4, "", "float32"),
        ),
        ("dequantize", {"codes": torch.empty(3, 64)}, None),
    ],
)  # fmt: skip
def test_the_problem_of_a_call(name: str, arguments: dict[str, Any], problem: Problem | None) -> None:
    assert problem_of_call(name, arguments, "cuda") == problem


@pytest.mark.parametrize(
    "problem",
    [
        Problem("linear", 70, 24, 96, INT4, "", "float16"),
        Problem("linear", 3, 24, 96, "int8/channel", TOKEN, "float32"),
        Problem("linear", 3, 24, 96, "fp8_e4m3/tensor", "fp8_e4m3/tensor", "float32"),
        Problem("linear", 3, 24, 96, "mxfp4", "mxfp4", "float32"),
        Problem("linear", 3, 24, 96, "nvfp4", "nvfp4", "float32"),
    ],
    ids=str,
)
def test_a_linear_is_checked_by_its_reference(problem: Problem) -> None:
    operands, check = prepared(problem, CPU)
    weight = (operands.tiles, operands.scale, operands.zero_point, operands.tensor_scale)  # pyright: ignore
    tail = (*weight, operands.bias, None, "", problem.k, problem.weights, operands.dtype, [])  # pyright: ignore
    x = (operands.x, operands.x_scale, operands.x_tensor_scale, operands.x_spec)  # pyright: ignore
    y = OPS.tiled_linear_codes(*x, *tail) if problem.activations else OPS.tiled_linear(operands.x, *tail)  # pyright: ignore
    assert check(y) == ""
    y[-1, 0] += 1
    assert f"1 of {min(problem.m, 64) * 24} values are wrong" in check(y)


@pytest.mark.parametrize("norm", ["", "rmsnorm", "layernorm"])
@pytest.mark.parametrize("spec", [TOKEN, "int8/tensor", "fp8_e4m3/token", "nvfp4"])
def test_a_quantization_is_checked_by_its_reference(spec: str, norm: str) -> None:
    operands, check = prepared(Problem("quantize", 70, 0, 96, "", spec, "float32", norm), CPU)
    assert isinstance(operands, QuantizeOperands)
    x, weight, bias = operands.x, operands.norm_weight, operands.norm_bias
    assert (weight is not None, bias is not None) == (bool(norm), norm == "layernorm")
    made = OPS.norm_quantize(x, norm, weight, bias, 1e-6, spec) if norm else OPS.quantize_dynamic(x, spec)
    codes, scale, whole = made
    assert check(made) == ""
    assert "values are wrong" in check((codes, (scale.float() * 2).to(scale.dtype), whole))
    assert "codes are wrong" in check((codes.roll(1, 1), scale, whole))
    if spec == "nvfp4":
        assert "values are wrong" in check((codes, scale, whole * 2))


def test_one_code_that_is_far_off_is_seen() -> None:
    operands, check = prepared(Problem("quantize", 64, 0, 4096, "", TOKEN, "float32"), CPU)
    assert isinstance(operands, QuantizeOperands)
    codes, scale, whole = OPS.quantize_dynamic(operands.x, TOKEN)
    codes[63, 4095] += 1
    assert check((codes, scale, whole)) == ""
    codes[63, 4095] += 1
    assert check((codes, scale, whole)) == "1 of 262144 codes are wrong, 1 by more than a step"


def test_the_next_float8_on_either_side_is_one_step_off() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = every[every.float().isfinite()]
    values, order = finite.float().sort(stable=True)
    steps = _number(finite)[order].diff()
    assert torch.equal(steps, (values.diff() > 0).int())  # both zeros are one


@pytest.mark.parametrize("spec", ["int8/tensor", "fp8_e4m3/tensor"])
def test_a_quantization_with_a_given_scale_is_checked(spec: str) -> None:
    operands, check = prepared(Problem("quantize", 70, 0, 96, "", spec, "float16", "static"), CPU)
    assert isinstance(operands, QuantizeOperands)
    assert operands.norm == ""
    assert operands.scale is not None
    codes, scale = OPS.quantize_static(operands.x, operands.scale.reshape(1), spec)
    assert codes.float().unique().numel() > 50
    assert check((codes, scale, torch.empty(0))) == ""
    assert "values are wrong" in check((codes, scale * 2, torch.empty(0)))


def test_a_lookup_is_checked_by_its_reference() -> None:
    operands, check = prepared(Problem("embedding", 5, 100, 32, INT4, "", "float32"), CPU)
    table = (operands.rows, operands.scale, operands.zero_point, None, 32, INT4, torch.float32)  # pyright: ignore
    y = OPS.embedding_dequantize(operands.indices, *table)  # pyright: ignore[reportAttributeAccessIssue]
    assert check(y) == ""
    assert "values are wrong" in check(y.flip(0))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def test_a_graph_for_a_gpu_gets_its_plans_anew_after_tuning(plans: Path, fake_model: None) -> None:
    captured = staged(Two(), torch.randn(6, 64), config="int4wo-g32")
    select_kernels(captured.gm, SM90)
    calls = list(calls_of(captured.gm, SM90))
    linears = [call for call in calls if call.problem.op == "linear"]
    assert [(call.problem.m, call.problem.n, call.problem.k) for call in linears] == [(6, 96, 64), (6, 64, 96)]
    assert use_tuned(captured.gm, SM90) == 0
    assert use_tuned(captured.gm, SM90, "quick") == 2
    fields = {kernel_id(kernel.name): (kernel.name, kernel.fields) for kernel in KERNELS.values()}
    for call in linears:
        tuned = lookup(call.problem, SM90).row(6)
        assert tuned.source == "modelled"
        assert Plan.from_ints(call.node.args[-1], fields).row(6).config == tuned.config  # pyright: ignore[reportArgumentType]
        assert note_of(call.node).kernel.startswith(f"{tuned.config} (modelled sm90")


def test_a_model_is_tuned_for_a_gpu_that_is_not_here(plans: Path, fake_model: None, fresh_dynamo: None) -> None:
    report = fxquant.tune(Two(), torch.randn(6, 64), config="int4wo-g32", target="sm90")
    assert {outcome.entry.problem.op for outcome in report.outcomes} == {"linear"}
    assert {outcome.entry.source for outcome in report.outcomes} == {"modelled"}
    assert report.measured == 0
    assert "chosen by the model of time, none of these measured" in report.summary
    again = fxquant.tune(Two(), torch.randn(6, 64), config="int4wo-g32", target="sm90")
    assert again.known == len(report.outcomes) == 2


def test_ops_without_a_plan_use_what_was_tuned_meanwhile(plans: Path, fake_model: None) -> None:
    asked = Problem("quantize", 16, 0, 512, "", TOKEN, "float32")
    forget_plans()
    before = config_for((), asked, "sm90")
    report = fxquant.tune([asked], target="sm90")
    assert config_for((), asked, "sm90") == report.outcomes[0].entry.config != before
    forget_plans()


def test_entries_of_every_kernel_are_found_by_its_source(plans: Path) -> None:
    arch = arch_named("sm90")
    problem = Problem("linear", 16, 96, 64, INT4, "", "float16")
    kernel = kernels_for(problem, arch)[0]
    config = kernel.candidates(problem, arch)[-1]
    (cache,) = caches_of("sm90")
    cache.write([Entry(problem, config, "modelled", kernel.source_hash, 1.0, 2.0)])
    assert (lookup(problem, arch).row(16).config, lookup(problem, "sm90").row(16).source) == (config, "modelled")
    cache.write([Entry(problem, config, "modelled", "another", 1.0, 2.0)])
    assert lookup(problem, SM90).row(16).source == "heuristic"
