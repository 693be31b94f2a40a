"""The GPU's bench without a GPU: how often caches are flushed, which errors a configuration may end in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.triton_kernels.operands import LinearOperands
from fxquant.tuning.measuring.benches import GpuBench, GpuCase

PROBLEM = Problem("linear", 4, 32, 64, "int8/channel", "", "float32")
CONFIG = KernelConfig.of("coded_mv", BLOCK_N=16)
CACHE = 1024


class Gpu:
    """A clock in flushes. Work is prepared in `preparing` of them, which start to run at once."""

    def __init__(self, preparing: int) -> None:
        self.preparing = preparing
        self.flushes = 0  # since the last record of 'before'
        self.samples: list[int] = []  # flushes before each

    def event(self, enable_timing: bool) -> SimpleNamespace:
        return SimpleNamespace(
            record=lambda: None, query=self.over, synchronize=self.wait, elapsed_time=lambda other: 0.25
        )

    def over(self) -> bool:
        """The flushes are over before the launches are there."""
        return self.flushes < self.preparing

    def wait(self) -> None:
        self.samples.append(self.flushes)
        self.flushes = 0


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(request.param)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=CACHE))
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("fxquant.triton_kernels.launch_by", answer)
    return gpu


def answer(config: KernelConfig, operands: LinearOperands) -> Tensor:
    weight = (operands.tiles, operands.scale, operands.zero_point, operands.tensor_scale)
    tail = (operands.bias, None, "", operands.in_features, operands.spec, operands.dtype, [])
    return torch.ops.fxquant.tiled_linear(operands.x, *weight, *tail)


def case_on_cpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    case = GpuBench(device="cpu").case(PROBLEM)
    assert isinstance(case, GpuCase)
    flush = case._flush
    monkeypatch.setattr(type(flush), "zero_", lambda t: setattr(gpu, "flushes", gpu.flushes + 1), raising=False)
    return case


@pytest.mark.parametrize("gpu", [3], indirect=True)
def test_a_sample_is_the_gpus_time_in_seconds(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_on_cpu(gpu, monkeypatch)
    assert case.sample(CONFIG) == 0.25e-3
    assert gpu.samples == [4]


@pytest.mark.parametrize("gpu", [11], indirect=True)
def test_a_sample_that_waited_for_its_launch_does_not_count(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_on_cpu(gpu, monkeypatch)
    case.sample(CONFIG)
    case.sample(CONFIG)
    assert gpu.samples == [4, 8, 16, 16]


@pytest.mark.parametrize("gpu", [10**6], indirect=True)
def test_a_device_that_never_waits_is_measured_all_the_same(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_on_cpu(gpu, monkeypatch)
    case.sample(CONFIG)
    case.sample(CONFIG)
    assert gpu.samples == [4, 8, 16, 32, 64, 128, 256, 256]


@pytest.mark.parametrize("gpu", [1], indirect=True)
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "it does not run: OutOfResources: out of resource: shared"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "it does not run: OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_a_configuration_that_does_not_run_is_wrong(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    case = GpuBench(device="cpu").case(PROBLEM)
    assert case.wrong(CONFIG) == ""

    def fail(config: KernelConfig, operands: LinearOperands) -> Tensor:
        raise error

    monkeypatch.setattr("fxquant.triton_kernels.launch_by", fail)
    assert case.wrong(CONFIG).startswith(words)
    assert "\n" not in case.wrong(CONFIG)


@pytest.mark.parametrize("gpu", [1], indirect=True)
def test_what_is_flushed_is_twice_the_larger_cache(gpu: Gpu) -> None:
    board = ARCHS["gfx942"].board  # its driver names the second level, not the last
    assert GpuBench(board.cache, "cpu")._flush.nbytes == 2 * board.cache
    assert GpuBench(0, "cpu")._flush.nbytes == 2 * CACHE
