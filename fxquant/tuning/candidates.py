"""Spaces: for each folder of kernels the configurations that a problem could run with."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fxquant import cpu_kernels
from fxquant.target import Arch, KernelConfig, Problem, Target, arch_named
from fxquant.tuning.cpu import ISA, blockings, cpu_kernel_for, isas_up_to


class Space(Protocol):
    """The kernels of one target."""

    def candidates(self, problem: Problem) -> Sequence[KernelConfig]:
        """Every configuration that the problem can run with, the heuristic's first; none if no kernel takes it."""
        ...

    def kernel_source(self, kernel: str) -> str:
        """A hash of that kernel's source: what was tuned on another source does not count. '' if there is no such."""
        ...


@dataclass(frozen=True)
class TritonSpace:
    """The Triton kernels on one architecture."""

    arch: Arch

    def candidates(self, problem: Problem) -> Sequence[KernelConfig]:
        from fxquant.triton_kernels import kernels_for

        by_kernel = (kernel.candidates(problem, self.arch) for kernel in kernels_for(problem, self.arch))
        return tuple(dict.fromkeys(itertools.chain.from_iterable(by_kernel)))

    def kernel_source(self, kernel: str) -> str:
        return _source_of(kernel)


@functools.cache
def _source_of(kernel: str) -> str:
    from fxquant.triton_kernels import KERNELS

    return KERNELS[kernel].source_hash if kernel in KERNELS else ""


@dataclass(frozen=True)
class CpuSpace:
    """The C++ kernels of this machine: what can be chosen is the instruction set, and for the widest a blocking.

    isas    their numbers, the widest, which is the heuristic's, first.
    source  a hash of the built library: of sources, flags and compiler.
    """

    isas: tuple[int, ...]
    source: str

    def candidates(self, problem: Problem) -> Sequence[KernelConfig]:
        kernel = cpu_kernel_for(problem)
        if kernel is None or not self.isas:
            return ()
        best = [{ISA: self.isas[0], **blocking} for blocking in blockings(problem, torch.get_num_threads())]
        return tuple(
            KernelConfig.of(kernel.name, **fields) for fields in (*best, *({ISA: isa} for isa in self.isas[1:]))
        )

    def kernel_source(self, kernel: str) -> str:
        return self.source


def space_of(target: Target | Arch | str) -> Space:
    """The kernels of a target, of an architecture, or of the name of one. A CPU's are built if they are not there."""
    if is_cpu(target):
        return cpu_space()
    return TritonSpace(arch_of(target))


def is_cpu(target: Target | Arch | str) -> bool:
    """'cpu' is the name of this machine's."""
    return target.device == "cpu" if isinstance(target, Target) else str(target) == "cpu"


def arch_of(target: Target | Arch | str) -> Arch:
    """The architecture of a GPU target. Raises `InvalidOption` for a name that is none."""
    if isinstance(target, Arch):
        return target
    return arch_named(target.arch if isinstance(target, Target) else target)


def cpu_space() -> CpuSpace:
    """What this CPU and the kernels' library can do; nothing without a library."""
    library = cpu_kernels.load()
    if library is None:
        return CpuSpace((), "")
    digest = hashlib.sha256(library.path.name.encode()).hexdigest()[:16]  # the name is a hash of all that made it
    return CpuSpace(isas_up_to(library.isa), digest)
