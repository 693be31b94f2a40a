"""Lowering: from the quantized reference graph to kernels, and on to something that runs."""

from __future__ import annotations

from fxquant.lowering.bind import Binding, BoundRecipe, Original, Packed, bind
from fxquant.lowering.execute import to_eager, to_inductor, to_training
from fxquant.lowering.plans import no_triton_kernel
from fxquant.lowering.select import select_kernels

__all__ = [
    "Binding",
    "BoundRecipe",
    "Original",
    "Packed",
    "bind",
    "no_triton_kernel",
    "select_kernels",
    "to_eager",
    "to_inductor",
    "to_training",
]
