"""Choosing codes well. Tensors in, tensors out; no kernels, no graphs."""

from __future__ import annotations

from torch import Tensor

from fxquant.algorithms.absmax import absmax
from fxquant.algorithms.hqq import hqq_range
from fxquant.algorithms.minmax import minmax
from fxquant.algorithms.mse import mse_range
from fxquant.algorithms.search import quantize_by
from fxquant.errors import InvalidOption, ShapeMismatch
from fxquant.numerics import Codes
from fxquant.spec import TensorSpec
from fxquant.spec.linears import algorithm_problem

__all__ = ["absmax", "hqq", "minmax", "mse", "quantize"]


def quantize(x: Tensor, spec: TensorSpec, algorithm: str = "auto") -> Codes:
    """Codes of x by the algorithm of that name: auto, absmax, minmax, mse or hqq.

    auto: absmax if the spec is symmetric, else minmax. x: any float dtype; the arithmetic is float32. A granule that
    holds NaN or infinity has scale NaN, whatever the algorithm. Raises `InvalidOption`, and `ShapeMismatch` for a
    tensor that is not of floats, or that cannot have the spec's granularity.
    """
    if problem := algorithm_problem(algorithm, spec):
        raise InvalidOption("algorithm", algorithm, problem)
    if not x.is_floating_point():
        raise ShapeMismatch("fxquant.algorithms.quantize", f"a tensor of dtype {x.dtype}", "a float dtype")
    if problem := spec.granularity.unfit(x.shape):
        met = f"a tensor of shape {list(x.shape)} for spec {spec}"
        raise ShapeMismatch("fxquant.algorithms.quantize", met, f"another shape ({problem})")
    match algorithm:
        case "mse":
            return mse(x, spec)
        case "hqq":
            return hqq(x, spec)
        case _:
            return absmax(x, spec) if spec.scheme == "symmetric" else minmax(x, spec)


def mse(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x with the ranges that leave the least squared error; any float dtype, any spec.

    The method is a search of ours (see `fxquant.algorithms.mse`).
    """
    return quantize_by(mse_range, x, spec)


def hqq(x: Tensor, spec: TensorSpec) -> Codes:
    """Quantize x by half-quadratic quantization; any float dtype, any spec.

    Source: Badri and Shaji, 2023 (see `fxquant.algorithms.hqq`).
    """
    return quantize_by(hqq_range, x, spec)
