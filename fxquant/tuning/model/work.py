"""What a problem costs at least: operations, the unit that does them, bytes; and the time a board needs for that."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from fxquant.spec import TensorSpec
from fxquant.target import Board, Problem, Work

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}


@functools.lru_cache(maxsize=256)
def _spec(text: str) -> TensorSpec:
    return TensorSpec.parse(text)


@functools.lru_cache(maxsize=4096)
def work_of(problem: Problem) -> Work:
    """Operations and bytes of a problem, each byte read or written once.

    Of a linear: x and its scales, codes, scales and zero points of the weight, bias and result. A linear on codes does
    not read the float x: quantizing is a problem of its own.
    """
    match problem.op:
        case "linear":
            m, n, k = problem.m, problem.n, problem.k
            result = m * n * BYTES_OF[problem.dtype]
            bias = n * BYTES_OF[problem.dtype]
            return Work(2 * m * n * k, unit_of(problem), x_bytes(problem) + weight_bytes(problem) + bias + result)
        case "quantize":
            made = _spec(problem.activations).nbytes((problem.m, problem.k))
            norm = problem.k * BYTES_OF[problem.dtype] * (1 + (problem.extra == "layernorm")) if problem.extra else 0
            return Work(0, "float32", problem.m * problem.k * BYTES_OF[problem.dtype] + made + norm)
        case "embedding":
            rows = _spec(problem.weights).nbytes((problem.m, problem.k))
            return Work(0, "float32", 8 * problem.m + rows + problem.m * problem.k * BYTES_OF[problem.dtype])


def x_bytes(problem: Problem) -> int:
    """Bytes of x [m, k] as a linear's kernel reads it: codes and scales, or floats."""
    if problem.activations:
        return _spec(problem.activations).nbytes((problem.m, problem.k)) if problem.m else 0
    return problem.m * problem.k * BYTES_OF[problem.dtype]


def weight_bytes(problem: Problem) -> int:
    """Bytes of the weight [n, k]: packed codes, scales, zero points; or floats, of a problem without `weights`."""
    if not problem.weights:
        return problem.n * problem.k * BYTES_OF[problem.dtype]
    return _spec(problem.weights).nbytes((problem.n, problem.k))


def unit_of(problem: Problem) -> str:
    """What multiplies: the narrowest unit that both sides fit, that of the float side if one is not quantized."""
    if not problem.activations:
        return "float32" if problem.dtype == "float32" else "float16"
    x, weight = (_spec(text).format for text in (problem.activations, problem.weights))
    if x.kind == weight.kind == "int":
        return "int8"
    if x.kind == weight.kind == "float":
        return "float4" if max(x.bits, weight.bits) == 4 else "float8"
    return "float16"


@dataclass(frozen=True)
class Roofline:
    """The least time of a work on a board.

    seconds     by the data sheet: the longer of bytes over bandwidth and operations over peak.
    attainable  by what was measured of both (`Board.attainable`, `Board.sustained`).
    bound_by    'memory' or 'compute': the longer of the attainable two.
    """

    seconds: float
    attainable: float
    bound_by: Literal["memory", "compute"]


def roofline_of(work: Work, board: Board) -> Roofline:
    """The least time of that work on that board."""
    moving = work.bytes / board.bandwidth
    computing = work.operations / board.rate(work.unit)
    moved, computed = moving / board.attainable, computing / board.kept(work.unit)
    return Roofline(max(moving, computing), max(moved, computed), "memory" if moved >= computed else "compute")
