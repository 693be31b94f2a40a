"""Operands of a problem on a GPU, and the check of what its kernels make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import pack_codes_rows
from fxquant.spec import TensorSpec
from fxquant.target import Problem
from fxquant.triton_kernels import Operands
from fxquant.triton_kernels.operands import (
    DTYPES,
    EmbeddingOperands,
    LinearOperands,
    QuantizeOperands,
    linear_operands,
)
from fxquant.tuning.measuring.checking import codes_difference, difference, first_and_last_rows

STATIC = "static"  # of a quantization's `extra`: the scale is given
_STATIC_SCALE = 4 / 127  # of x from the normal distribution: few codes are at the end of int8's
_MOST_ROWS = 65536  # of a table: a lookup in a longer one takes as long
_OPS = torch.ops.fxquant

Check = Callable[[Any], str]


def prepared(problem: Problem, device: torch.device) -> tuple[Operands, Check]:
    """Random operands on the device, and a function that says what is wrong with a launcher's result ('': nothing).

    The right answers are made on the CPU, by the ops' references.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # a compiled model's seed stays
        torch.manual_seed(0)
        match problem.op:
            case "linear":
                linear = linear_operands(problem, device)
                return linear, _check_linear(linear)
            case "quantize":
                quantizing = _quantize_operands(problem, device)
                return quantizing, _check_quantize(quantizing)
            case "embedding":
                table = _embedding_operands(problem, device)
                return table, _check_embedding(table)


def _check_linear(operands: LinearOperands) -> Check:
    rows = first_and_last_rows(operands.x.shape[0], operands.x.device)
    cut = _on_cpu(dataclasses.replace(operands, x=operands.x[rows], x_scale=_cut(operands.x_scale, rows)))
    weight = (cut.tiles, cut.scale, cut.zero_point, cut.tensor_scale)
    tail = (*weight, cut.bias, None, cut.activation, cut.in_features, cut.spec, cut.dtype, [])
    if cut.x_scale is None:
        wanted = _OPS.tiled_linear(cut.x, *tail)
    else:
        wanted = _OPS.tiled_linear_codes(cut.x, cut.x_scale, cut.x_tensor_scale, cut.x_spec, *tail)
    return lambda got: difference(got[rows], wanted)


def _cut(scale: Tensor | None, rows: Tensor) -> Tensor | None:
    return scale if scale is None or scale.shape[0] == 1 else scale[rows]


def _quantize_operands(problem: Problem, device: torch.device) -> QuantizeOperands:
    x = torch.randn(problem.m, problem.k, device=device).to(DTYPES[problem.dtype])
    if problem.extra == STATIC:
        return QuantizeOperands(x, problem.activations, scale=torch.full((1, 1), _STATIC_SCALE, device=device))
    weight, bias = (torch.rand(problem.k, device=device).to(x.dtype) for _ in range(2))
    return QuantizeOperands(
        x,
        problem.activations,
        norm=problem.extra,
        norm_weight=weight if problem.extra else None,
        norm_bias=bias if problem.extra == "layernorm" else None,
        eps=1e-6,
    )


def _check_quantize(operands: QuantizeOperands) -> Check:
    spec, m = TensorSpec.parse(operands.spec), operands.x.shape[0]
    whole = spec.depends_on_whole and operands.scale is None  # the reference needs all rows
    rows = torch.arange(m) if whole else first_and_last_rows(m)
    cut = _on_cpu(operands)
    if cut.scale is not None:
        wanted = _OPS.quantize_static(cut.x[rows], cut.scale.reshape(1), cut.spec)
    elif cut.norm:
        wanted = _OPS.norm_quantize(cut.x[rows], cut.norm, cut.norm_weight, cut.norm_bias, cut.eps, cut.spec)
    else:
        wanted = _OPS.quantize_dynamic(cut.x[rows], cut.spec)

    def check(got: Any) -> str:
        codes, scale, *tensor_scale = (t.cpu() for t in got)
        of_rows = scale if scale.shape[0] == 1 else scale[rows]
        wrong = codes_difference((codes[rows], of_rows), wanted)
        if not wrong and spec.has_tensor_scale:
            wrong = difference(tensor_scale[0].reshape(-1), wanted[2].reshape(-1))
        return wrong

    return check


def _embedding_operands(problem: Problem, device: torch.device) -> EmbeddingOperands:
    spec, n = TensorSpec.parse(problem.weights), min(problem.n, _MOST_ROWS)
    codes, scale, zero_point, tensor_scale = quantize(torch.randn(n, problem.k, device=device), spec)
    return EmbeddingOperands(
        indices=torch.randint(n, (problem.m,), device=device),
        rows=pack_codes_rows(codes, spec),
        scale=scale,
        in_features=problem.k,
        spec=problem.weights,
        dtype=DTYPES[problem.dtype],
        zero_point=zero_point if spec.has_zero_point else None,
        tensor_scale=tensor_scale if spec.has_tensor_scale else None,
    )


def _check_embedding(operands: EmbeddingOperands) -> Check:
    rows = first_and_last_rows(operands.indices.shape[0])
    cut = _on_cpu(operands)
    table = (cut.rows, cut.scale, cut.zero_point, cut.tensor_scale, cut.in_features, cut.spec, cut.dtype)
    wanted = _OPS.embedding_dequantize(cut.indices[rows], *table)
    return lambda got: difference(got.cpu()[rows], wanted)


def _on_cpu(operands: Any) -> Any:
    fields = ((field.name, getattr(operands, field.name)) for field in dataclasses.fields(operands))
    return dataclasses.replace(operands, **{name: t.cpu() for name, t in fields if isinstance(t, Tensor)})
