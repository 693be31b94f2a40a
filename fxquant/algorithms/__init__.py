"""Choosing codes well. Tensors in, tensors out; no kernels, no graphs."""

from __future__ import annotations

from torch import Tensor

from fxquant.algorithms.absmax import absmax
from fxquant.algorithms.hqq import hqq_range
from fxquant.algorithms.minmax import minmax
from fxquant.algorithms.mse import mse_range
from fxquant.algorithms.search import quantize_by
from fxquant.errors import InvalidOption
from fxquant.numerics import Codes
from fxquant.spec import TensorSpec
from fxquant.spec.linears import algorithm_problem

__all__ = ["absmax", "hqq", "minmax", "mse", "quantize"]


def quantize(x: Tensor, spec: TensorSpec, algorithm: str = "auto") -> Codes:
    """Codes of x by the algorithm of that name: auto, absmax, minmax, mse or hqq.

    auto: absmax if the spec is symmetric, else minmax. x: any float dtype; the arithmetic is float32. A granule that
    holds NaN or infinity has scale NaN, whatever the algorithm. Raises `InvalidOption`.
    """
    if problem := algorithm_problem(algorithm, spec):
        raise InvalidOption("algorithm", algorithm, problem)
    match algorithm:
        case "mse":
            return mse(x, spec)
        case "hqq":
            return hqq(x, spec)
        case _:
            return absmax(x, spec) if spec.scheme == "symmetric" else minmax(x, spec)


def mse(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x with the ranges that leave the least squared error."""
    return quantize_by(mse_range, x, spec)


def hqq(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x by half-quadratic quantization."""
    return quantize_by(hqq_range, x, spec)
