"""The problem of a call of one of fxquant's ops, on the CPU or a GPU; fake tensors will do as its arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fxquant.spec import TensorSpec
from fxquant.target import Problem
from fxquant.tuning.cpu import cpu_problem

_UNKNOWN = 512  # rows, where nothing is known of a symbolic size
PLAN = "plan"  # the argument of the ops that take their configurations with them


def problem_of_call(name: str, arguments: Mapping[str, Any], device: str) -> Problem | None:
    """What op `name` of torch.ops.fxquant is asked to do; None if it is none of those that can be tuned.

    m is that of the example, if a size is symbolic.
    """
    if device == "cpu":
        x = arguments.get("x", arguments.get("codes"))
        return None if x is None else cpu_problem(name, dict(arguments), rows_of(x.shape[:-1]))
    match name:
        case "tiled_linear" | "tiled_linear_codes":
            return _tiled(arguments)
        case "quantize_dynamic" | "fake_quantize" | "norm_quantize":
            return _quantize(arguments, arguments.get("norm", ""))
        case "quantize_static":
            return _quantize(arguments, "static")
        case "int8_quantize_per_token":
            return _quantize({**arguments, "spec": "int8/token"}, "")
        case "embedding_dequantize":
            m, n = rows_of(arguments["indices"].shape), int(arguments["rows"].shape[0])
            k, dtype = int(arguments["embedding_dim"]), _word(arguments["dtype"])
            return Problem("embedding", m, n, k, arguments["spec"], "", dtype)
    return None


def _tiled(arguments: Mapping[str, Any]) -> Problem:
    x = arguments["x"] if "x" in arguments else arguments["codes"]
    dtype = arguments["dtype"]
    if "x" in arguments and x.dtype != dtype:  # under autocast both are float32 in the kernel
        dtype = torch.float32
    n, k = int(arguments["tiles"].shape[0]), int(arguments["in_features"])
    activations = arguments.get("x_spec", "")
    return Problem("linear", rows_of(x.shape[:-1]), n, k, arguments["spec"], activations, _word(dtype))


def _quantize(arguments: Mapping[str, Any], extra: str) -> Problem:
    x, spec = arguments["x"], TensorSpec.parse(arguments["spec"])
    m, k, text = rows_of(x.shape[:-1]), rows_of(x.shape[-1:]), str(spec)
    if spec.granularity.kind == "sample":  # a sample is a token once its axes are one
        m, k, text = rows_of(x.shape[:1]), rows_of(x.shape[1:]), text.replace("sample", "token")
    return Problem("quantize", m, 0, k, "", text, _word(x.dtype), extra)


def rows_of(sizes: Iterable[int | torch.SymInt]) -> int:
    """The product of sizes; a symbolic one counts as in the example that it was captured with."""
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # its import takes as long as all of ours

    return math.prod(optimization_hint(size, fallback=_UNKNOWN) for size in sizes)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
