"""Whole models on the GPU: every preset compiled, dynamic shapes, CUDA graphs, modules that move, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters

from fxquant.spec import PRESETS
from tests.gpu import models as checks

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # at the import of torch._inductor
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WIDTH = 256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_compiled(preset: str, dtype: torch.dtype, device: torch.device) -> None:
    checks.check_preset(preset, device, dtype, WIDTH)


@pytest.mark.parametrize("preset", PRESETS)
def test_compiled_with_dynamic_shapes(preset: str, device: torch.device) -> None:
    checks.check_preset(preset, device, torch.bfloat16, WIDTH, dynamic=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_in_cuda_graphs(preset: str, device: torch.device) -> None:
    counters.clear()
    checks.check_replays(preset, device, torch.bfloat16, WIDTH, mode="reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_modules_move(preset: str, device: torch.device) -> None:
    checks.check_moves(preset, device, WIDTH)


@pytest.mark.parametrize("preset", ["int8wo", "int8dq", "int4wo", "fp8dqrow", "mxfp4wo"])
def test_memory_while_quantizing(preset: str, device: torch.device) -> None:
    def peak_of(run: Callable[[], None]) -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    checks.check_memory(preset, device, 8192, peak_of)
