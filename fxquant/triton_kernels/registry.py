"""All kernels, and the one that a problem gets."""

from __future__ import annotations

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.kernel import Operands, TritonKernel

# In the order of preference where nothing is known but that several take a problem.
_ALL: tuple[TritonKernel, ...] = ()
KERNELS: dict[str, TritonKernel] = {kernel.name: kernel for kernel in _ALL}


def kernels_for(problem: Problem, arch: Arch) -> tuple[TritonKernel, ...]:
    """The kernels that take the problem on that architecture, preferred first."""
    return tuple(k for k in KERNELS.values() if k.op == problem.op and not k.why_not(problem, arch))


def launch_by(config: KernelConfig, operands: Operands) -> object:
    """Run the kernel that a configuration names."""
    return KERNELS[config.kernel].run(operands, config)
