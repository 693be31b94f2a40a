"""Launches of kernels on GPUs that have less of something than the one that stands for their architecture."""

from __future__ import annotations

import contextlib
from typing import Any

from fxquant.target import KernelConfig, Problem, arch_named

# By configurations that want more than a GPU has, problems and architectures: what runs instead.
_INSTEAD: dict[tuple[KernelConfig, Problem, str], KernelConfig] = {}


def launch_fitting(config: KernelConfig, operands: Any, problem: Problem, arch: str) -> Any:
    """What the configuration's kernel makes of the operands; if it doesn't fit, what the first that does makes of them.

    Compute capability 8.6 has 99 KiB of shared memory for a block, 8.0, whose configurations it gets, 163. Raises
    Triton's OutOfResources if none fits.
    """
    from triton.runtime.errors import OutOfResources

    from fxquant.triton_kernels import kernels_for, launch_by

    problem = problem.bucketed()
    try:
        return launch_by(_INSTEAD.get((config, problem, arch), config), operands)
    except OutOfResources:
        target = arch_named(arch)
        for other in (c for kernel in kernels_for(problem, target) for c in kernel.candidates(problem, target)):
            with contextlib.suppress(OutOfResources):
                result = launch_by(other, operands)
                _INSTEAD[config, problem, arch] = other
                return result
        raise
