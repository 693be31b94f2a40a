"""Activations to codes by their own range, or by a scale that is given; alone, or behind an RMSNorm or a LayerNorm.

Codes and scales are bit-equal to the reference `quantize_dynamic` on the CPU. (On a GPU torch divides by a number as it
multiplies with its reciprocal: a scale of the reference may differ by one unit in the last place there.) Behind a norm
they are those of the norm in float32, rounded to x's dtype once, as torch's `rms_norm` and `layer_norm` do: no product
is fused with a sum, and 1 / sqrt is two correctly rounded steps, so that all that differs from torch is the order in
which a row is summed up; where that is exact, the codes are equal too.

x is read once where a row fits into registers (`BLOCK_K` >= K); else as often as the row is needed, out of the cache. A
spec of the whole tensor takes two launches: ranges of parts, then codes, whose every program takes the largest range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import launch, output
from fxquant.triton_kernels.norming import NORMS, moments_of_rows, moments_of_tile, normed, tile_of
from fxquant.triton_kernels.operands import QuantizeOperands
from fxquant.triton_kernels.rounding import (
    codes_of_values,
    range_bits,
    scale_of_tensor,
    scales_of_ranges,
    spec_constants,
)

MOST_IN_REGISTERS = 16384
_NAME = "quantize_rows"


@triton.jit
def quantize_parts(
    x_ptr,  # [M, K] float16, bfloat16 or float32; stride_x between rows, 1 between columns
    weight_ptr,  # [K] any float, contiguous, or None
    bias_ptr,  # [K] any float, contiguous, or None
    parts_ptr,  # [rows of the grid * columns of the grid] int32: ranges
    M, K, stride_x, eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """Of each program's share of x, and of the norm's result, the largest absolute value as a bit pattern."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    largest = tl.zeros([BLOCK_M], tl.int32)
    for row in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        mean = tl.zeros([BLOCK_M], tl.float32)
        rstd = mean
        bits = tl.zeros([BLOCK_M], tl.int32)
        if FITS:
            cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
            values = tile_of(x_ptr, rows, cols, M, K, stride_x)
            if NORM != 0:
                mean, rstd = moments_of_tile(values, cols, K, eps, NORM)
            values = normed(values, weight_ptr, bias_ptr, cols, mean, rstd, K, dtype, NORM, HAS_WEIGHT, HAS_BIAS)
            bits = tl.max(range_bits(values), 1)
        else:
            if NORM != 0:
                mean, rstd = moments_of_rows(x_ptr, rows, M, K, stride_x, eps, NORM, BLOCK_K)
            for start in range(0, K, BLOCK_K):
                cols = start + tl.arange(0, BLOCK_K)
                values = tile_of(x_ptr, rows, cols, M, K, stride_x)
                values = normed(values, weight_ptr, bias_ptr, cols, mean, rstd, K, dtype, NORM, HAS_WEIGHT, HAS_BIAS)
                bits = tl.maximum(bits, tl.max(range_bits(values), 1))
        # A row behind the last one is no zero any more where a bias was added.
        largest = tl.maximum(largest, tl.where(rows < M, bits, 0))
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part, tl.max(largest, 0))


@triton.jit
def _scales_of_rows(
    bits,
    given_ptr,
    GIVEN: tl.constexpr,
    SCALE: tl.constexpr,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    EMAX: tl.constexpr,
):
    """Ranges of rows, int32 [R, 1] -> (the scale as it is stored, the factor), by the range or by the given scale."""
    if GIVEN:
        given = tl.load(given_ptr) + tl.zeros(bits.shape, tl.float32)
        finite = range_bits(given) < 0x7F800000
        # 2**-126: the reciprocal of anything smaller is not finite, or close to that.
        usable = finite & (given >= 1.1754943508222875e-38)
        factor = tl.math.div_rn(tl.full(bits.shape, 1.0, tl.float32), tl.where(usable, given, 1.0))
        factor = tl.where(usable, factor, 0.0)
        stored = tl.where(finite & (given >= 0) & (bits < 0x7F800000), given, float("nan"))
    else:
        stored, factor = scales_of_ranges(bits, 1.0, SCALE, QMAX, SMALLEST, EMAX)
    return stored, factor


@triton.jit
def _store_tile(
    values, factor, whole, codes_ptr, scale_ptr, rows, start, M, K,
    RANGE: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, QMAX: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """Codes of values [R, C], the columns from `start`; with their scales where groups have them."""
    R: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    if RANGE == "group":
        grouped = tl.reshape(values, [R, C // GROUP, GROUP])
        scale, factors = scales_of_ranges(tl.max(range_bits(grouped), 2), whole, SCALE, QMAX, SMALLEST, EMAX)
        values = tl.reshape(grouped * factors[:, :, None], [R, C])
        groups = start // GROUP + tl.arange(0, C // GROUP)
        along = tl.cdiv(K, GROUP)
        inside = (rows[:, None] < M) & (groups[None, :] < along)
        tl.store(scale_ptr + rows[:, None].to(tl.int64) * along + groups[None, :], scale, mask=inside)
    else:
        values *= factor
    cols = start + tl.arange(0, C)
    codes = codes_of_values(values, QMAX, MANTISSA, BIAS, BITS, FNUZ)
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    tl.store(codes_ptr + rows[:, None].to(tl.int64) * K + cols[None, :], codes, mask=inside)


@triton.jit
def quantize_rows(
    x_ptr,  # [M, K] float16, bfloat16 or float32; stride_x between rows, 1 between columns
    weight_ptr,  # [K] any float, contiguous, or None
    bias_ptr,  # [K] any float, contiguous, or None
    parts_ptr,  # [parts] int32: ranges of the tensor's parts (RANGE 'tensor', and scales of e4m3), else None
    given_ptr,  # [1] float32: the scale (RANGE 'given'), else None
    codes_ptr,  # [M, K] int8, or uint8 patterns of floats; contiguous
    scale_ptr,  # [1], [M] or [M, ceil(K / GROUP)], contiguous; float32, or bits as int16 or uint8
    tensor_scale_ptr,  # [1] float32 (scales of e4m3), else None
    M, K, stride_x, eps, parts,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    RANGE: tl.constexpr,  # 'row', 'group', 'tensor' or 'given'
    GROUP: tl.constexpr, PARTS: tl.constexpr,
    SCALE: tl.constexpr, QMAX: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr, FNUZ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows a program; whole ones, or those of a column block where nothing is asked of the whole row."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    whole = tl.full([1, 1], 1.0, tl.float32)
    factor = whole
    if RANGE == "tensor" or SCALE == "e4m3":
        lanes = tl.arange(0, PARTS)
        bits = tl.max(tl.load(parts_ptr + lanes, mask=lanes < parts, other=0), 0) + tl.zeros([1, 1], tl.int32)
        if SCALE == "e4m3":
            whole = scale_of_tensor(bits, QMAX * 448.0, SMALLEST)
            kept, kept_ptr = whole, tensor_scale_ptr
        else:
            kept, factor = scales_of_ranges(bits, 1.0, SCALE, QMAX, SMALLEST, EMAX)
            kept_ptr = scale_ptr
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(kept_ptr + tl.zeros([1, 1], tl.int32), kept)
    OF_ROWS: tl.constexpr = RANGE == "row" or RANGE == "given"
    if FITS:
        cols = first + tl.arange(0, BLOCK_K)
        values = tile_of(x_ptr, rows, cols, M, K, stride_x)
        if NORM != 0:
            mean, rstd = moments_of_tile(values, cols, K, eps, NORM)
        values = normed(values, weight_ptr, bias_ptr, cols, mean, rstd, K, dtype, NORM, HAS_WEIGHT, HAS_BIAS)
        if OF_ROWS:
            bits = tl.max(range_bits(values), 1, keep_dims=True)
            scale, factor = _scales_of_rows(bits, given_ptr, RANGE == "given", SCALE, QMAX, SMALLEST, EMAX)
            tl.store(scale_ptr + rows[:, None], scale, mask=rows[:, None] < M)
        _store_tile(
            values, factor, whole, codes_ptr, scale_ptr, rows, first, M, K,
            RANGE, GROUP, SCALE, QMAX, SMALLEST, EMAX, MANTISSA, BIAS, BITS, FNUZ,
        )  # fmt: skip
    else:
        if NORM != 0:
            mean, rstd = moments_of_rows(x_ptr, rows, M, K, stride_x, eps, NORM, BLOCK_K)
        if OF_ROWS:
            bits = tl.zeros([BLOCK_M, 1], tl.int32)
            for start in range(0, K, BLOCK_K):
                cols = start + tl.arange(0, BLOCK_K)
                values = tile_of(x_ptr, rows, cols, M, K, stride_x)
                values = normed(values, weight_ptr, bias_ptr, cols, mean, rstd, K, dtype, NORM, HAS_WEIGHT, HAS_BIAS)
                bits = tl.maximum(bits, tl.max(range_bits(values), 1, keep_dims=True))
            scale, factor = _scales_of_rows(bits, given_ptr, RANGE == "given", SCALE, QMAX, SMALLEST, EMAX)
            tl.store(scale_ptr + rows[:, None], scale, mask=rows[:, None] < M)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            values = tile_of(x_ptr, rows, cols, M, K, stride_x)
            values = normed(values, weight_ptr, bias_ptr, cols, mean, rstd, K, dtype, NORM, HAS_WEIGHT, HAS_BIAS)
            _store_tile(
                values, factor, whole, codes_ptr, scale_ptr, rows, start, M, K,
                RANGE, GROUP, SCALE, QMAX, SMALLEST, EMAX, MANTISSA, BIAS, BITS, FNUZ,
            )  # fmt: skip


def run(operands: QuantizeOperands, config: KernelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, tensor_scale) of operands.x [M, K], as `quantize_dynamic` returns them.

    With a scale that is given, the result's scale is float32 [M, 1]: that one, and NaN for rows that are not finite.
    """
    spec, (m, k) = TensorSpec.parse(operands.spec), operands.x.shape
    x = operands.x if operands.x.stride(1) == 1 or k == 1 else operands.x.contiguous()
    reach = _range_of(spec, k, given=operands.scale is not None)
    shape = [m, 1] if reach == "given" else spec.granularity.scale_shape((m, k))
    codes = output([m, k], spec.code_dtype, x.device)
    scale = output(shape, spec.scale_dtype, x.device)
    tensor_scale = output([1, 1] if spec.has_tensor_scale else [0], torch.float32, x.device)
    if x.numel() == 0:
        return codes, *_of_nothing(scale, tensor_scale)
    block_k, block_m, norm = config["BLOCK_K"], config["BLOCK_M"], NORMS[operands.norm]
    by_column = not norm and reach in ("group", "tensor")
    columns, fits = (triton.cdiv(k, block_k), True) if by_column else (1, block_k >= k)
    weight, bias = (
        t.contiguous() if norm and t is not None else None for t in (operands.norm_weight, operands.norm_bias)
    )
    shared = dict(
        NORM=norm, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_K=block_k,
        FITS=fits, num_warps=config["num_warps"], enable_fp_fusion=False,
    )  # fmt: skip
    blocks, parts, ranges = triton.cdiv(m, block_m), 1, None
    if reach == "tensor" or spec.has_tensor_scale:
        down = min(blocks, max(1, config["PARTS"] // columns))
        parts = down * columns
        ranges = output([parts], torch.int32, x.device)
        launch(quantize_parts, (down, columns), x, weight, bias, ranges, m, k, x.stride(0), operands.eps, **shared)
    given = None if operands.scale is None else operands.scale.reshape(1)
    launch(
        quantize_rows, (blocks, columns), x, weight, bias, ranges, given, _stored(codes), _stored(scale),
        tensor_scale if spec.has_tensor_scale else None, m, k, x.stride(0), operands.eps, parts,
        RANGE=reach, GROUP=spec.granularity.size if reach == "group" else 1, PARTS=triton.next_power_of_2(parts),
        **spec_constants(spec), **shared,
    )  # fmt: skip
    return codes, scale, tensor_scale


def _range_of(spec: TensorSpec, k: int, *, given: bool) -> str:
    if given:
        return "given"
    match spec.granularity.kind:
        case "tensor":
            return "tensor"
        case "group" if spec.granularity.size < k or spec.has_tensor_scale:
            return "group"
        case _:
            return "row"


def _stored(t: Tensor) -> Tensor:
    """The tensor as the integers that a kernel stores, where it has no float dtype that Triton computes with."""
    return (
        t
        if t.dtype in (torch.int8, torch.uint8, torch.float32)
        else t.view({1: torch.uint8, 2: torch.int16}[t.itemsize])
    )


def _of_nothing(scale: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the reference gives for a tensor without values: the range of nothing is 0."""
    return scale.zero_() if scale.dtype.itemsize > 1 else scale.view(torch.uint8).zero_().view(
        scale.dtype
    ), tensor_scale.zero_()


def _why_not(problem: Problem, arch: Arch) -> str:
    if problem.op != "quantize":
        return f"it makes codes of an activation, not a {problem.op}"
    if problem.extra not in ("", "static", *NORMS):
        return f"it knows {', '.join(filter(None, NORMS))} before it, not {problem.extra}"
    spec = TensorSpec.parse(problem.activations)
    if spec.scheme != "symmetric" or (spec.format.kind == "int" and spec.format.bits != 8):
        return f"it makes symmetric int8 or floats, not {spec}"
    kind, size = spec.granularity.kind, spec.granularity.size
    if kind not in ("tensor", "token", "sample", "group"):
        return f"it takes a scale per tensor, token, sample or group, not {spec.granularity}"
    if kind == "group" and size < problem.k and (size & (size - 1) or size > MOST_IN_REGISTERS):
        return f"it takes groups of a power of two up to {MOST_IN_REGISTERS}, not of {size}"
    return ""


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    """Whole rows where they fit: several short ones a program, and threads for 8 to 32 values each."""
    spec = TensorSpec.parse(problem.activations)
    reach = _range_of(spec, problem.k, given=problem.extra == "static")
    width = triton.next_power_of_2(max(problem.k, 16))
    size = triton.next_power_of_2(spec.granularity.size) if reach == "group" else 1
    if reach in ("group", "tensor") and not problem.extra:  # nothing is asked of the whole row
        width = min(width, 1024)
    full = min(max(width, size), MOST_IN_REGISTERS)
    whole = reach == "tensor" or spec.has_tensor_scale
    made: dict[KernelConfig, None] = {}
    halved = () if whole else ((max(full // 2, size), 2048),)
    for block_k, tile in ((full, 2048), (full, 8192), *halved, (full, 1024), (full, 4096)):
        block_m = max(1, tile // block_k)
        for values in (16, 32, 8) if tile == 2048 else (16,):
            warps = block_m * block_k // (values * arch.warp_size)
            config = QUANTIZE_ROWS.config(block_m, block_k, 1024 if whole else 1, min(max(warps, 1), 16))
            made[config] = None
    return tuple(made)


QUANTIZE_ROWS = TritonKernel(
    name=_NAME,
    op="quantize",
    fields=("BLOCK_M", "BLOCK_K", "PARTS", "num_warps"),
    why_not=_why_not,
    candidates=_candidates,
    run=run,
    summary="activations to int8 or float codes by token, tensor or group, alone or behind RMSNorm or LayerNorm",
)
