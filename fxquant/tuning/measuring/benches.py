"""Benches: run one problem's configurations on a device, check the answer, take the time with cold caches."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from fxquant.target import KernelConfig, Problem
from fxquant.tuning.cpu import CpuKernel, cpu_kernel_for, number_of
from fxquant.tuning.measuring.checking import difference, first_and_last_rows
from fxquant.tuning.plans.device import last_level_bytes

_SAMPLE = 2e-4  # seconds: a shorter one is mostly the clock
_MOST_COPIES = 64
_FLUSHES = 4  # of the GPU's caches before a sample; doubled while they are over too soon
_MOST_FLUSHES = 256


class Case(Protocol):
    """One problem with its operands, ready to be run."""

    def wrong(self, config: KernelConfig) -> str:
        """What is wrong with the answer; '' if nothing is."""
        ...

    def probe(self, config: KernelConfig) -> float:
        """Seconds of a short run, by which hopeless configurations are known before they waste time."""
        ...

    def sample(self, config: KernelConfig) -> float:
        """Seconds of one run, with the weight out of the caches."""
        ...


class Bench(Protocol):
    """Makes the cases of one device."""

    def case(self, problem: Problem) -> Case: ...


class CpuBench:
    """Cases on this CPU."""

    def case(self, problem: Problem) -> Case:
        kernel = cpu_kernel_for(problem)
        assert kernel is not None, f"no CPU kernel takes {problem}"
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # of the model that is being compiled
            return CpuCase(kernel, problem)


class CpuCase:
    """The weight lies in memory several times, more than the last cache holds, and each run reads the next copy.

    That is how a model finds its weights: all others were read since. (Of a small weight there are not copies enough;
    models of small weights find them in the cache too.)
    """

    def __init__(self, kernel: CpuKernel, problem: Problem) -> None:
        self._kernel = kernel
        args = kernel.operands(problem)
        weight: Tensor = args[kernel.weight]
        copies = min(_MOST_COPIES, math.ceil(2 * last_level_bytes() / max(1, weight.nbytes)))
        held = [weight, *(weight.clone() for _ in range(copies - 1))]
        self._copies = [(*args[: kernel.weight], copy, *args[kernel.weight + 1 :]) for copy in held]
        self._next = 0
        self._checked = first_and_last_rows(args[0].shape[0])
        self._wanted = kernel.reference((*self._rows(args),))

    def wrong(self, config: KernelConfig) -> str:
        return difference(self._kernel.run(self._rows(self._copies[0]), number_of(config)), self._wanted)

    def probe(self, config: KernelConfig) -> float:
        args = self._rows(self._copies[0])
        started = time.perf_counter()
        self._kernel.run(args, number_of(config))
        return time.perf_counter() - started

    def sample(self, config: KernelConfig) -> float:
        spent, runs = 0.0, 0
        with torch.no_grad():
            while spent < _SAMPLE:
                args = self._copies[self._next % len(self._copies)]
                self._next += 1
                started = time.perf_counter()
                self._kernel.run(args, number_of(config))
                spent += time.perf_counter() - started
                runs += 1
        return spent / runs

    def _rows(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with x, and its scales if it comes quantized, cut down to the rows that are checked."""
        x, second, *rest = args
        by_rows = isinstance(second, Tensor) and second.shape == (x.shape[0], 1) and self._kernel.weight == 2
        return x[self._checked], second[self._checked] if by_rows else second, *rest


class GpuBench:
    """Cases on the current GPU of this process. `cache`: bytes of its last one, where the driver names a smaller."""

    def __init__(self, cache: int = 0, device: str = "cuda") -> None:
        self._device = torch.device(device)
        known = torch.cuda.get_device_properties(self._device).L2_cache_size
        self._flush = torch.empty(2 * max(cache, known), dtype=torch.uint8, device=self._device)

    def case(self, problem: Problem) -> Case:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return GpuCase(problem, self._device, self._flush)


class GpuCase:
    """Timed by events, each run after the caches were written over.

    The GPU is busy with that while the CPU prepares the launches: a sample is the GPU's time, without Python's. If it
    was through before the last launch was there, the sample does not count and the next one writes more often.
    """

    def __init__(self, problem: Problem, device: torch.device, flush: Tensor) -> None:
        from fxquant.tuning.measuring.gpu import prepared  # it imports Triton

        self._operands, self._check = prepared(problem, device)
        self._flush = flush
        self._flushes = _FLUSHES
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def wrong(self, config: KernelConfig) -> str:
        from triton.errors import TritonError

        try:
            got = self._run(config)
            torch.cuda.synchronize()
        except (RuntimeError, TritonError) as error:  # too much shared memory, say, or no code for it
            return f"it does not run: {type(error).__name__}: {error}".partition("\n")[0]
        return self._check(got)

    def probe(self, config: KernelConfig) -> float:
        return self.sample(config)

    def sample(self, config: KernelConfig) -> float:
        while True:
            for _ in range(self._flushes):
                self._flush.zero_()
            self._before.record()
            self._run(config)
            self._after.record()
            hidden = not self._before.query()
            self._after.synchronize()
            if hidden or self._flushes >= _MOST_FLUSHES:
                return self._before.elapsed_time(self._after) / 1e3
            self._flushes *= 2

    def _run(self, config: KernelConfig) -> Any:
        from fxquant.triton_kernels import launch_by

        return launch_by(config, self._operands)
