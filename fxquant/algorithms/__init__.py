"""Choosing codes well. Tensors in, tensors out; no kernels, no graphs."""

from __future__ import annotations

from torch import Tensor

from fxquant.algorithms.absmax import absmax
from fxquant.algorithms.minmax import minmax
from fxquant.numerics import Codes
from fxquant.spec import TensorSpec

__all__ = ["absmax", "minmax", "quantize"]


def quantize(x: Tensor, spec: TensorSpec) -> Codes:
    """Codes of x by the plain choice for its scheme: absmax if symmetric, minmax if affine."""
    return minmax(x, spec) if spec.scheme == "affine" else absmax(x, spec)
