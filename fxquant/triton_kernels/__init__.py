"""Triton kernels and their launchers: tensors in, tensors out. `KERNELS` says what there is.

Triton is imported with this package, and nothing imports this package before a GPU, a compile-only target or the
interpreter is asked for.
"""

from __future__ import annotations

from fxquant.triton_kernels.kernel import Operands, TritonKernel
from fxquant.triton_kernels.registry import KERNELS, kernels_for, launch_by

__all__ = ["KERNELS", "Operands", "TritonKernel", "kernels_for", "launch_by"]
