"""A space of kernels, a bench and facts that need no machine: times and answers are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxquant.target import KernelConfig, Problem
from fxquant.tuning.measuring import Case
from fxquant.tuning.plans.device import Device

DEVICE = Device("gpu", "Fake GPU", "sm90", fxquant="1", torch="2", triton="3")
PROBLEM = Problem("linear", 16, 64, 128, "int8/channel", "int8/token", "float16")


def tile(size: int, kernel: str = "mm") -> KernelConfig:
    return KernelConfig.of(kernel, BLOCK_M=size)


A, B, C, D = (tile(size) for size in (16, 32, 64, 128))


@dataclass
class FakeSpace:
    """All problems have the same candidates; `sources` are hashes by kernel."""

    configs: Sequence[KernelConfig] = (A, B, C, D)
    sources: dict[str, str] = field(default_factory=lambda: {"mm": "source-1"})

    def candidates(self, problem: Problem) -> Sequence[KernelConfig]:
        return self.configs if problem.op == "linear" else ()

    def kernel_source(self, kernel: str) -> str:
        return self.sources.get(kernel, "")


@dataclass
class FakeBench:
    """Configurations take the times given, one after the other, the last for ever; `lies` have a wrong answer."""

    times: Mapping[KernelConfig, Sequence[float]]
    lies: Sequence[KernelConfig] = ()
    samples: list[KernelConfig] = field(default_factory=list)
    probes: Mapping[KernelConfig, float] = field(default_factory=dict)

    def case(self, problem: Problem) -> Case:
        return self

    def wrong(self, config: KernelConfig) -> str:
        return "3 of 64 values are wrong" if config in self.lies else ""

    def probe(self, config: KernelConfig) -> float:
        return self.probes.get(config, 1.0)

    def sample(self, config: KernelConfig) -> float:
        times = self.times[config]
        done = self.samples.count(config)
        self.samples.append(config)
        return times[min(done, len(times) - 1)]


@dataclass(frozen=True)
class FakeFacts:
    registers: int = 64
    spills: int = 0
    shared: int = 1024
    warps: int = 4
