"""One cell measured: the pipeline loaded, quantized and compiled by fxquant's public doors, checked, timed."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

import fxquant
from benchmarks.gpu_recipes.pipelines import Setting, call, load, parts, quantized_parts
from benchmarks.gpu_recipes.published import Cell
from benchmarks.harness import Error, WrongAnswer

GIB = 2**30


@dataclass(frozen=True)
class Effort:
    """Warm-up calls, timed calls, and how the transformer is compiled."""

    warm_up: int = 2
    rounds: int = 3
    mode: str | None = None
    executor: str = "inductor"


@dataclass(frozen=True)
class Measured:
    """What one cell takes, and makes.

    model_memory      GiB after loading and quantizing. inference_memory: GiB at the peak of the timed calls, on a GPU.
    seconds           median of a call. quantized: how many modules of which part, in words. output: images or frames.
    """

    model_memory: float
    inference_memory: float | None
    seconds: float
    quantized: str
    output: torch.Tensor

    def error_to(self, other: Measured) -> Error:
        return Error.of(self.output, other.output)


def measure(cell: Cell, setting: Setting, effort: Effort) -> Measured:
    """Run one cell. Raises `WrongAnswer` if what it makes is not finite."""
    _forget()
    pipe = load(cell.model, getattr(torch, cell.dtype), setting)
    if cell.fuse and (cell.spec is None or not cell.compile):
        pipe.transformer.fuse_qkv_projections()  # otherwise the compiler joins them, without a second copy
    reports = _quantize(pipe, cell, setting)
    pipe.to(setting.device)
    _forget()
    model_memory = _allocated(pipe, setting)
    if cell.compile:
        _compile(pipe.transformer, cell, effort)
    if cell.compile_vae:
        pipe.vae.decode = torch.compile(pipe.vae.decode, **_compiling(cell, effort))
    output = torch.empty(0)
    for _ in range(max(1, effort.warm_up)):
        output = call(pipe, cell.batch, setting)
    if not output.isfinite().all():
        raise WrongAnswer(str(cell), "values that are not finite", "finite ones")
    _reset_peak(setting)
    seconds = []
    for _ in range(effort.rounds):
        started = time.perf_counter()
        call(pipe, cell.batch, setting)  # ends with a copy to the host, so all work is done
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / GIB if setting.device.startswith("cuda") else None
    return Measured(model_memory, peak, statistics.median(seconds), ", ".join(reports), output)


def _quantize(pipe: Any, cell: Cell, setting: Setting) -> list[str]:
    """Layer by layer on the device, so that no more than one float layer is there; what was done, in words."""
    if cell.spec is None:
        return []
    words = []
    for name in quantized_parts(pipe, cell.compile_vae):
        part = parts(pipe)[name]
        done = fxquant.quantize(part, str(cell.spec), device=setting.device)
        words.append(f"{name} {len(done.quantized)}")
    return words


def _compile(transformer: torch.nn.Module, cell: Cell, effort: Effort) -> None:
    transformer.compile(fullgraph=True, **_compiling(cell, effort))


def _compiling(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Arguments of torch.compile: Inductor for a float pipeline, fxquant's backend for a quantized one."""
    if cell.spec is None:
        return (
            {"backend": effort.executor, "mode": effort.mode} if effort.executor == "inductor" else {"backend": "eager"}
        )
    options = {"preset": str(cell.spec), "fuse": cell.fuse, "executor": effort.executor, "mode": effort.mode}
    return {"backend": "fxquant", "options": options}


def _allocated(pipe: Any, setting: Setting) -> float:
    """GiB that the pipeline holds: by the allocator on a GPU, by counting its tensors' memory on a CPU."""
    if setting.device.startswith("cuda"):
        return torch.cuda.memory_allocated() / GIB
    storages = {}
    for part in parts(pipe).values():
        for tensor in (*part.parameters(), *part.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / GIB


def _forget() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _reset_peak(setting: Setting) -> None:
    if setting.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
