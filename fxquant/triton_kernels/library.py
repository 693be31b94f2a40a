"""int_mm and float8_mm: the products of torch's libraries, behind the same operands as the kernels of our own.

torch._int_mm gives int32 sums and torch._scaled_mm, with scales of 1, float32 sums; the kernel that finishes pieces of
K then scales, adds, and rounds them. That writes and reads every sum once more, 8 bytes, which our own kernels don't.
Only bfloat16 results of float8 without activation and residual come from torch._scaled_mm alone, scaled by row.

So neither is preferred where nothing is known: a library's time can't be known without the device, that of our kernels
can be modelled. Where measuring finds one to be faster (large float8 products with bfloat16 results are the likely
case), tables name it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import output
from fxquant.triton_kernels.operands import LinearOperands
from fxquant.triton_kernels.scaled_mm_split import finish_sums
from fxquant.triton_kernels.scaled_products import codes_of, for_descriptor, kind_of, scales_of, why_not_scaled

FEWEST_ROWS, INT8_MULTIPLE, FLOAT8_MULTIPLE = 17, 8, 16


def _run_int_mm(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    x, w = _both(operands)
    m = x.shape[0]
    if m < FEWEST_ROWS:  # a plan may name this kernel for a range that begins lower
        x = pad(x, (0, 0, 0, FEWEST_ROWS - m))
    return _finished(torch._int_mm(x, w.t())[:m], operands)


def _run_float8_mm(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    x, w = _both(operands)
    if x.shape[0] == 0:
        return output((0, operands.out_features), operands.dtype, x.device)
    bias = operands.bias
    plain = not operands.activation and operands.residual is None and (bias is None or bias.dtype == torch.bfloat16)
    # By row it takes no e5m2 weight.
    if plain and operands.dtype == torch.bfloat16 and w.dtype == torch.float8_e4m3fn:
        x_scale, scale, _ = scales_of(operands)
        by_row = x_scale.expand(x.shape[0], 1).contiguous()
        return torch._scaled_mm(x, w.t(), by_row, scale.float(), bias=bias, out_dtype=torch.bfloat16)
    one = torch.ones((), device=x.device)
    return _finished(torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.float32), operands)


def _both(operands: LinearOperands) -> tuple[Tensor, Tensor]:
    """x [M, K] with rows at multiples of 16 bytes, and the weight [N, K], a part of its tiles."""
    x, w, _ = codes_of(operands)
    return for_descriptor(x), for_descriptor(w)[:, : operands.in_features]


def _finished(sums: Tensor, operands: LinearOperands) -> Tensor:
    out = output(sums.shape, operands.dtype, sums.device)
    finish_sums(sums[None], out, operands)
    return out


def _why_not_int_mm(problem: Problem, arch: Arch) -> str:
    if reason := why_not_scaled(problem):
        return reason
    if kind_of(TensorSpec.parse(problem.weights)) != "int8":
        return "torch._int_mm multiplies int8"
    if problem.m < FEWEST_ROWS:
        return f"torch._int_mm takes {FEWEST_ROWS} rows or more, not {problem.m}"
    return _not_multiple("torch._int_mm", problem, INT8_MULTIPLE)


def _why_not_float8_mm(problem: Problem, arch: Arch) -> str:
    if reason := why_not_scaled(problem):
        return reason
    spec, x_spec = TensorSpec.parse(problem.weights), TensorSpec.parse(problem.activations)
    if kind_of(spec) != "float8":
        return "torch._scaled_mm multiplies float8"
    if arch.backend == "hip" or not arch.float8:
        return f"torch._scaled_mm has no e4m3fn and e5m2 on {arch}"
    if spec.code_dtype == x_spec.code_dtype == torch.float8_e5m2:
        return "torch._scaled_mm takes e5m2 on one side only"
    return _not_multiple("torch._scaled_mm", problem, FLOAT8_MULTIPLE)


def _not_multiple(name: str, problem: Problem, multiple: int) -> str:
    if problem.k % multiple or problem.n % multiple:
        return f"{name} takes multiples of {multiple} for K and N, not {problem.k} and {problem.n}"
    return ""


def _one(kernel: str) -> tuple[KernelConfig, ...]:
    return (KernelConfig(kernel),)


INT_MM = TritonKernel(
    name="int_mm",
    op="linear",
    fields=(),
    why_not=_why_not_int_mm,
    candidates=lambda problem, arch: _one("int_mm"),
    run=_run_int_mm,
    summary="int8 × int8 by torch._int_mm, finished by a kernel of ours",
)
FLOAT8_MM = TritonKernel(
    name="float8_mm",
    op="linear",
    fields=(),
    why_not=_why_not_float8_mm,
    candidates=lambda problem, arch: _one("float8_mm"),
    run=_run_float8_mm,
    summary="float8 × float8 by torch._scaled_mm, by row, or finished by a kernel of ours",
)
