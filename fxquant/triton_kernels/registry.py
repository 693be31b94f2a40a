"""All kernels, and the one that a problem gets."""

from __future__ import annotations

import torch

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.coded_mm import CODED_MM
from fxquant.triton_kernels.coded_mv import CODED_MV
from fxquant.triton_kernels.decoded_mm import DECODED_MM
from fxquant.triton_kernels.embedding_rows import EMBEDDING_ROWS
from fxquant.triton_kernels.grouped_mm import GROUPED_MM
from fxquant.triton_kernels.kernel import Operands, TritonKernel
from fxquant.triton_kernels.library import FLOAT8_MM, INT_MM
from fxquant.triton_kernels.mx_mm import MX_MM
from fxquant.triton_kernels.operands import EmbeddingOperands
from fxquant.triton_kernels.quantize_rows import QUANTIZE_ROWS
from fxquant.triton_kernels.scaled_mm import SCALED_MM
from fxquant.triton_kernels.scaled_mm_persistent import SCALED_MM_PERSISTENT
from fxquant.triton_kernels.scaled_mm_split import SCALED_MM_SPLIT

# In the order of preference where nothing is known but that several take a problem.
_ALL: tuple[TritonKernel, ...] = (
    SCALED_MM_SPLIT,
    SCALED_MM_PERSISTENT,
    SCALED_MM,
    INT_MM,
    FLOAT8_MM,
    DECODED_MM,
    CODED_MV,
    CODED_MM,
    GROUPED_MM,
    MX_MM,
    QUANTIZE_ROWS,
    EMBEDDING_ROWS,
)
KERNELS: dict[str, TritonKernel] = {kernel.name: kernel for kernel in _ALL}


def kernels_for(problem: Problem, arch: Arch) -> tuple[TritonKernel, ...]:
    """The kernels that take the problem on that architecture, preferred first."""
    problem = problem.without_steps()
    return tuple(k for k in KERNELS.values() if k.op == problem.op and not k.why_not(problem, arch))


def launch_by(config: KernelConfig, operands: Operands) -> object:
    """Run the kernel that a configuration names, on the GPU where the operands are: Triton takes the current one."""
    with torch.cuda.device_of(operands.rows if isinstance(operands, EmbeddingOperands) else operands.x):
        return KERNELS[config.kernel].run(operands, config)
