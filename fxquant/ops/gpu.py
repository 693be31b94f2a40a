"""The ops on the CUDA key (AMD's GPUs have it too): Triton kernels by plan, the reference where none takes a problem.

Triton is imported at the first call. Nothing here waits for the device or allocates but for results, so that a CUDA
graph can hold every call once its kernel is compiled and loaded: after a first one outside of the graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import NoGpuKernelWarning
from fxquant.numerics import decode, pack_codes_rows
from fxquant.ops import reference
from fxquant.ops.checks import activation_spec, check_activation, check_devices
from fxquant.ops.fitting import launch_fitting
from fxquant.ops.library import LIBRARY
from fxquant.ops.norm_quantize import check_norm
from fxquant.ops.quantize_static import check_static
from fxquant.ops.storage import check_table
from fxquant.ops.tiled_checks import check_codes_linear, check_tiled_linear
from fxquant.spec import TensorSpec
from fxquant.target import KernelConfig, Op, Plan, Problem, Target, arch_named
from fxquant.target.config import kernel_id


def tiled_linear(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    plan: Sequence[int],
) -> Tensor:
    """tiled_linear by a kernel. Where x has another dtype than the result, both are float32 in the kernel."""
    weight = (tiles, scale, zero_point, tensor_scale)
    parsed = check_tiled_linear(x, *weight, bias, residual, activation, in_features, spec, dtype)
    inner = dtype if x.dtype == dtype else torch.float32
    problem = Problem(
        "linear", x.shape[:-1].numel(), tiles.shape[0], in_features, spec, "", _word(inner)
    ).without_steps()
    arch = arch_on(x.device)
    config = config_for(plan if inner == dtype else (), problem, arch)  # the plan is for its dtype
    if config is None:
        return reference.tiled_linear(x, *weight, bias, residual, activation, in_features, spec, dtype, plan)
    from fxquant.triton_kernels.operands import LinearOperands

    operands = LinearOperands(
        x=x.reshape(problem.m, in_features).to(inner),
        tiles=tiles.contiguous(),
        scale=scale.contiguous(),
        in_features=in_features,
        spec=spec,
        dtype=inner,
        zero_point=_dense(zero_point),
        tensor_scale=_dense(tensor_scale if parsed.has_tensor_scale else None),
        bias=_dense(bias),
        residual=_rows(residual, problem),
        activation=activation,
    )
    return launch_fitting(config, operands, problem, arch).to(dtype).view([*x.shape[:-1], problem.n])


def tiled_linear_codes(
    codes: Tensor,
    x_scale: Tensor,
    x_tensor_scale: Tensor | None,
    x_spec: str,
    tiles: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    in_features: int,
    spec: str,
    dtype: torch.dtype,
    plan: Sequence[int],
) -> Tensor:
    """tiled_linear_codes by a kernel."""
    weight = (tiles, scale, zero_point, tensor_scale)
    epilogue = (bias, residual, activation, in_features, spec, dtype)
    parsed, x_parsed = check_codes_linear(codes, x_scale, x_tensor_scale, x_spec, *weight, *epilogue)
    problem = Problem(
        "linear", codes.shape[:-1].numel(), tiles.shape[0], in_features, spec, x_spec, _word(dtype)
    ).without_steps()
    arch = arch_on(codes.device)
    config = config_for(plan, problem, arch)
    if config is None:
        return reference.tiled_linear_codes(codes, x_scale, x_tensor_scale, x_spec, *weight, *epilogue, plan)
    from fxquant.triton_kernels.operands import LinearOperands

    x = codes.reshape(problem.m, codes.shape[-1])
    if x_parsed.format.bits == 4 and codes.shape[-1] == in_features:
        x = pack_codes_rows(x, x_parsed)
    operands = LinearOperands(
        x=x,
        tiles=tiles.contiguous(),
        scale=scale.contiguous(),
        in_features=in_features,
        spec=spec,
        dtype=dtype,
        x_spec=x_spec,
        x_scale=x_scale.reshape(-1, x_scale.shape[-1]),
        x_tensor_scale=_whole(x_tensor_scale, x_parsed),
        zero_point=_dense(zero_point),
        tensor_scale=_dense(tensor_scale if parsed.has_tensor_scale else None),
        bias=_dense(bias),
        residual=_rows(residual, problem),
        activation=activation,
    )
    return launch_fitting(config, operands, problem, arch).view([*codes.shape[:-1], problem.n])


def quantize_dynamic(x: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_dynamic by a kernel."""
    check_activation("fxquant.quantize_dynamic", x)
    parsed = activation_spec("fxquant.quantize_dynamic", x, spec)
    return _quantized(x, parsed) or reference.quantize_dynamic(x, spec)


def int8_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8_quantize_per_token by a kernel."""
    return quantize_dynamic(x, "int8/token")[:2]


def norm_quantize(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    """norm_quantize by a kernel."""
    parsed = check_norm(x, norm, weight, bias, spec)
    found = _quantized(x, parsed, norm, norm=norm, norm_weight=weight, norm_bias=bias, eps=eps)
    return found or reference.norm_quantize(x, norm, weight, bias, eps, spec)


def quantize_static(x: Tensor, scale: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """quantize_static by a kernel."""
    found = _quantized(x, check_static(x, scale, spec), "static", scale=scale)
    return found[:2] if found else reference.quantize_static(x, scale, spec)


def fake_quantize(x: Tensor, spec: str) -> Tensor:
    """fake_quantize by the kernel that makes codes; these are decoded at once."""
    check_activation("fxquant.fake_quantize", x)
    parsed = activation_spec("fxquant.fake_quantize", x, spec)
    found = _quantized(x, parsed)
    if found is None:
        return reference.fake_quantize(x, spec)
    codes, scale, tensor_scale = found
    return decode(codes, scale, None, parsed, x.dtype, tensor_scale if parsed.has_tensor_scale else None)


def embedding_dequantize(
    indices: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    embedding_dim: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """embedding_dequantize by a kernel."""
    check_devices("fxquant.embedding_dequantize", indices=indices, rows=rows)
    table = (rows, scale, zero_point, tensor_scale, embedding_dim, spec, dtype)
    check_table("fxquant.embedding_dequantize", *table)
    problem = Problem(
        "embedding", indices.numel(), rows.shape[0], embedding_dim, spec, "", _word(dtype)
    ).without_steps()
    arch = arch_on(rows.device)
    config = config_for((), problem, arch)
    if config is None:
        return reference.embedding_dequantize(indices, *table)
    from fxquant.triton_kernels.operands import EmbeddingOperands

    operands = EmbeddingOperands(
        indices=indices.reshape(-1),
        rows=rows,
        scale=scale,
        in_features=embedding_dim,
        spec=spec,
        dtype=dtype,
        zero_point=zero_point,
        tensor_scale=tensor_scale,
    )
    return launch_fitting(config, operands, problem, arch).view([*indices.shape, embedding_dim])


def _quantized(x: Tensor, spec: TensorSpec, extra: str = "", **more: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, scale and tensor scale of x; None if no kernel makes them. `more`: further operands of the kernel."""
    width = x.shape[-1]
    rows, text = x.shape[:-1].numel(), str(spec)
    if spec.granularity.kind == "sample":  # a sample is a token once its axes are one
        rows, width, text = x.shape[0], x.shape[1:].numel(), text.replace("sample", "token")
    problem = Problem("quantize", rows, 0, width, "", text, _word(x.dtype), extra)
    arch = arch_on(x.device)
    config = config_for((), problem, arch)
    if config is None:
        return None
    from fxquant.triton_kernels.operands import QuantizeOperands

    operands = QuantizeOperands(x.reshape(rows, width), text, **more)
    codes, scale, *rest = launch_fitting(config, operands, problem, arch)
    static = extra == "static"  # each row has the one scale, or NaN
    shape = [*x.shape[:-1], 1] if static else spec.granularity.scale_shape(x.shape)
    whole = rest[0] if rest and rest[0] is not None else None
    tensor_scale = whole.view([1] * x.dim()) if spec.has_tensor_scale and whole is not None else _none(x)
    return codes.view(x.shape), scale.view(shape), tensor_scale


def _whole(tensor_scale: Tensor | None, spec: TensorSpec) -> Tensor | None:
    return tensor_scale.reshape(1, 1) if spec.has_tensor_scale and tensor_scale is not None else None


def _dense(t: Tensor | None) -> Tensor | None:
    """As kernels read what belongs to a weight; a view of another tensor is copied."""
    return None if t is None else t.contiguous()


def _none(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=x.device)


def _rows(residual: Tensor | None, problem: Problem) -> Tensor | None:
    return None if residual is None else residual.reshape(problem.m, problem.n)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def arch_on(device: torch.device) -> str:
    """The name of the architecture that kernels on that device are compiled for; '' if Triton does not run there."""
    return Target.of_this_machine(device).arch


def config_for(plan: Sequence[int], problem: Problem, arch: str) -> KernelConfig | None:
    """The configuration that runs the problem: the plan's, where its kernel takes it here; else that of this machine's
    tables; None, with one warning, if no kernel takes it."""
    found = _planned(tuple(plan), problem, arch) if plan and arch else None
    found = found or (_looked_up(problem, arch) if arch else None)
    if found is None:
        _warn(problem.op, problem.weights, problem.activations, arch)
    return found


@functools.lru_cache(maxsize=4096)
def _planned(plan: tuple[int, ...], problem: Problem, arch: str) -> KernelConfig | None:
    """None for a plan of another version or architecture: its kernel is not here, or has no such configuration."""
    from fxquant.triton_kernels import KERNELS

    fields = {kernel_id(kernel.name): (kernel.name, kernel.fields) for kernel in KERNELS.values()}
    try:
        config = Plan.from_ints(plan, fields).row(problem.m).config
    except (KeyError, ValueError):
        return None
    kernel, target = KERNELS[config.kernel], arch_named(arch)
    fits = not kernel.why_not(problem, target) and config in kernel.candidates(problem.bucketed(), target)
    return config if fits else None


@functools.lru_cache(maxsize=4096)
def _looked_up(problem: Problem, arch: str) -> KernelConfig | None:
    from fxquant.triton_kernels import KERNELS, kernels_for
    from fxquant.tuning.plans.lookup import lookup

    target = arch_named(arch)
    able = kernels_for(problem, target)
    if not able:
        return None
    plan = lookup(problem, Target("cuda", arch=arch))
    config = plan.row(problem.m).config if plan.rows else None
    return config if config and KERNELS.get(config.kernel) in able else able[0].heuristic(problem, target)


def forget_plans() -> None:
    """Ask the tables anew at the next call of an op without a plan: something has been tuned."""
    _looked_up.cache_clear()


@functools.cache
def _warn(op: Op, weights: str, activations: str, arch: str) -> None:
    warnings.warn(NoGpuKernelWarning(op, weights, activations, arch), stacklevel=4)


for _kernel in (
    tiled_linear,
    tiled_linear_codes,
    quantize_dynamic,
    int8_quantize_per_token,
    norm_quantize,
    quantize_static,
    fake_quantize,
    embedding_dequantize,
):
    LIBRARY.impl(_kernel.__name__, _kernel, "CUDA")
