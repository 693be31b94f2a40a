"""Tuning the C++ kernels of this machine, for real: measured, kept, found again, and put into graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import cpu_kernels
from fxquant.errors import InvalidOption, NothingToTune
from fxquant.target import KernelConfig, Problem, Target
from fxquant.tuning import Entry, Progress, TuneReport, caches_of, lookup, tune_problems, tuner_for
from fxquant.tuning.candidates import cpu_space
from fxquant.tuning.cpu import CPU_KERNELS, cpu_kernel_for, words_of
from fxquant.tuning.measuring.benches import CpuBench, CpuCase
from fxquant.tuning.measuring.checking import codes_difference, difference

pytestmark = pytest.mark.skipif(cpu_kernels.find_compiler() is None, reason="no C++ compiler: no kernels to tune")

FORMATS = [
    ("int8_linear_dynamic", "int8/channel", "int8/token", "float32", ""),
    ("int8_linear", "int8/channel", "int8/token", "bfloat16", "codes"),
    ("int8_linear_static", "int8/channel", "int8/tensor", "float32", ""),
    ("int8_linear_weight_only", "int8/channel", "", "bfloat16", ""),
    ("linear_dynamic", "int4/group32/affine", "int8/token", "float32", ""),
    ("linear_weight_only", "int4/group32/affine", "", "float16", ""),
    ("linear_weight_only", "nvfp4", "", "float32", ""),
]


def problem(weights: str, activations: str, dtype: str, extra: str, m: int = 5) -> Problem:
    return Problem("linear", m, 40, 96, weights, activations, dtype, extra)


@pytest.fixture
def target() -> Target:
    cpu_kernels.load()
    return Target.of_this_machine()


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[KernelConfig]:
    """What has been timed."""
    samples: list[KernelConfig] = []
    original = CpuCase.sample

    def sample(self: CpuCase, config: KernelConfig) -> float:
        samples.append(config)
        return original(self, config)

    monkeypatch.setattr(CpuCase, "sample", sample)
    return samples


def test_each_kernel_has_its_problems() -> None:
    assert {name for name, *_ in FORMATS} == {kernel.name for kernel in CPU_KERNELS}


@pytest.mark.parametrize(("name", "weights", "activations", "dtype", "extra"), FORMATS)
@pytest.mark.parametrize("m", [1, 70])
def test_every_candidate_gives_the_references_answer(
    name: str, weights: str, activations: str, dtype: str, extra: str, m: int
) -> None:
    asked = problem(weights, activations, dtype, extra, m)
    kernel = cpu_kernel_for(asked)
    assert kernel is not None
    assert kernel.name == name
    case = CpuBench().case(asked)
    for config in cpu_space().candidates(asked):
        assert case.wrong(config) == "", config
        assert case.sample(config) > 0


def test_a_kernel_that_is_wrong_somewhere_is_found() -> None:
    asked = problem("int8/channel", "int8/token", "float32", "")
    kernel = cpu_kernel_for(asked)
    assert kernel is not None

    class Liar(type(kernel)):
        def run(self, args: tuple[Any, ...], isa: int) -> Tensor:
            y = super().run(args, isa)
            y[-1, -1] *= 1.01
            return y

    case = CpuCase(Liar(**vars(kernel)), asked)
    assert case.wrong(cpu_space().candidates(asked)[0]).startswith("1 of 200 values are wrong, first at [4, 39]: ")


def test_differences_between_results() -> None:
    y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert difference(y, y.clone()) == ""
    assert difference(y * (1 + 2**-20), y) == ""
    assert difference(y.half(), (y * (1 + 2**-12)).half()) == ""
    assert difference(y[:4], y) == "the result is torch.float32 [4, 16], not torch.float32 [8, 16]"
    assert "of 128 values are wrong" in difference(y * 1.001, y)
    broken = y.clone()
    broken[0, 0] = float("nan")
    assert "1 of 128 values are wrong, first at [0, 0]: nan" in difference(broken, y)


def test_differences_between_codes() -> None:
    codes, scale = torch.arange(-64, 64).to(torch.int8).view(8, 16), torch.ones(8, 1)
    assert codes_difference((codes, scale), (codes, scale)) == ""
    assert codes_difference((codes + 1, scale), (codes, scale)) == "128 of 128 codes are wrong, 0 by more than a step"
    assert "8 of 8 values are wrong" in codes_difference((codes, scale * 2), (codes, scale))
    assert codes_difference((codes[:4], scale), (codes, scale)) == (
        "the codes are torch.int8 [4, 16], not torch.int8 [8, 16]"
    )


def test_a_second_run_measures_nothing(plans: Path, target: Target, sampled: list[KernelConfig]) -> None:
    asked = problem("int8/channel", "int8/token", "float32", "")
    first = tune_problems([asked], target)
    assert (len(first.outcomes), first.known) == (1, 0)
    assert first.measured == len(cpu_space().isas)
    assert sampled
    sampled.clear()
    second = tune_problems([asked], target)
    assert (second.known, second.measured, sampled) == (1, 0, [])
    assert lookup(asked, target).row(5).source == "tuned"
    assert list(plans.glob("plans-*.json")) == [Path(second.path)]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def kernels_of(model: Any) -> list[str]:
    return [site.kernel for graph in model.report().graphs for site in graph.sites]


@torch.no_grad()
def test_compiling_with_autotune_measures_keeps_and_chooses(
    plans: Path, fresh_dynamo: None, sampled: list[KernelConfig]
) -> None:
    model, x = Two(), torch.randn(6, 64)
    options: dict[str, Any] = {"autotune": "quick", "executor": "eager"}
    tuned = torch.compile(model, backend="fxquant", options=options)
    y = tuned(x)
    assert len({config.kernel for config in sampled}) == 1
    assert len(list(plans.glob("plans-*.json"))) == 1
    sampled.clear()
    torch._dynamo.reset()
    later = fxquant.compile(model, executor="eager")
    assert torch.equal(later(x), y)
    assert sampled == []
    assert all("(tuned)" in words and "int8_linear_dynamic isa=" in words for words in kernels_of(later))


@torch.no_grad()
def test_without_plans_nothing_changes_and_nothing_is_measured(
    plans: Path, fresh_dynamo: None, sampled: list[KernelConfig]
) -> None:
    view = fxquant.compile(Two(), executor="eager")
    view(torch.randn(6, 64))
    assert kernels_of(view) == ["int8_linear_dynamic +gelu", "int8_linear_dynamic"]
    assert sampled == []
    assert not list(plans.glob("*"))


@torch.no_grad()
def test_neither_the_models_autocast_nor_its_seed_matter(plans: Path, fresh_dynamo: None) -> None:
    view, x = fxquant.compile(Two(), executor="eager", autotune="quick"), torch.randn(6, 64)
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view(x)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))
    assert all("(tuned)" in words for words in kernels_of(view))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
@torch.no_grad()
def test_inductor_runs_what_was_tuned(plans: Path, target: Target, fresh_dynamo: None) -> None:
    narrowest(Problem("linear", 6, 96, 64, "int8/channel", "int8/token", "float32"), target)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)), torch.randn(6, 64)
    tuned = torch.compile(model, backend="fxquant", options={"autotune": "quick"})
    assert torch.equal(tuned(x), fxquant.compile(model, executor="eager")(x))


def narrowest(asked: Problem, target: Target) -> None:
    """Have the cache say that the portable kernel is the fastest."""
    (cache,) = caches_of(target)
    space = cpu_space()
    config = space.candidates(asked)[-1]
    cache.write([Entry(asked.bucketed(), config, "tuned", space.kernel_source(config.kernel), 1e-6, 2e-6, "full")])


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_graph_runs_what_the_cache_says_by_rows(
    plans: Path, target: Target, fresh_dynamo: None, dynamic: bool
) -> None:
    narrowest(Problem("linear", 6, 96, 64, "int8/channel", "int8/token", "float32"), target)
    model, x = Two(), torch.randn(6, 64)
    view = fxquant.compile(model, executor="eager", dynamic=dynamic)
    y = view(x)
    assert kernels_of(view) == ["int8_linear_dynamic isa=portable (tuned) +gelu", "int8_linear_dynamic"]
    plain = fxquant.compile(model, executor="eager", autotune="none")
    assert torch.equal(plain(x), y)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "kernel"),
    [
        ("int8wo", "int8_linear_weight_only"),
        ("int4wo-g32", "linear_weight_only"),
        ("int4dq", "linear_dynamic"),
        ("fp8wo", "linear_weight_only"),
    ],
)
def test_every_format_is_tuned(plans: Path, fresh_dynamo: None, config: str, kernel: str) -> None:
    view = fxquant.compile(Two(), config, executor="eager", autotune="quick")
    view(torch.randn(2, 64))
    assert [words.partition(" isa=")[0] for words in kernels_of(view)] == [kernel] * 2


def test_tuning_a_model(plans: Path, fresh_dynamo: None) -> None:
    steps: list[Progress] = []
    report = fxquant.tune(Two(), torch.randn(6, 64), progress=steps.append)
    assert isinstance(report, TuneReport)
    assert [(o.entry.problem.m, o.entry.problem.n, o.entry.problem.k) for o in report.outcomes] == [
        (8, 96, 64),
        (8, 32, 96),
    ]
    assert (report.known, len(steps)) == (0, 4)
    assert "2 problems for " in str(report)
    assert "int8_linear_dynamic isa=" in str(report)
    assert fxquant.tune(Two(), torch.randn(6, 64)).known == 2
    assert set(report.to_json()) == {"device", "path", "outcomes"}


def test_rows_that_are_not_given_are_all_buckets(plans: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.tuning.report.M_BUCKETS", (1, 4))
    report = tune_problems([problem("int8/channel", "", "float32", "", m=0)], target)
    assert [outcome.entry.problem.m for outcome in report.outcomes] == [1, 4]


def test_what_cannot_be_tuned_is_said(plans: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NothingToTune, match=r"no kernel takes any of the problems, or no memory is left \(embedding 5"):
        tune_problems([dataclasses.replace(problem("int8/channel", "", "float32", ""), op="embedding")], target)
    with pytest.raises(NothingToTune, match="no quantized products were given"):
        fxquant.tune([])
    with pytest.raises(InvalidOption, match="it takes 'quick' or 'full'"):
        fxquant.tune([], mode="slow")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("fxquant.cpu_kernels.load", lambda: None)
    with pytest.raises(NothingToTune, match="its kernels are not built"):
        tuner_for(target)


def test_configurations_in_words() -> None:
    assert words_of(KernelConfig.of("int8_linear_dynamic", isa=2)) == "int8_linear_dynamic isa=avx2"
    assert words_of(KernelConfig.of("mm", BLOCK_M=64, num_warps=4)) == "mm 64 w4"


def test_the_kept_times_are_those_of_the_configuration(plans: Path, target: Target) -> None:
    report = tune_problems([problem("int8/channel", "int8/token", "float32", "")], target)
    entry = report.outcomes[0].entry
    assert 0 < entry.seconds <= entry.heuristic_seconds < 1
