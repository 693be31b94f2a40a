"""Products of codes under scales by groups along K: y = x_scale * sum over g of scale[g] * sum of products in g.

x is int8 or float8, per token, per tensor or by the weight's groups. The weight: integers of 2 to 8 bits, symmetric or
affine, by group, block, channel or tensor; or float8 by group or block. Sums of a granule are exact in int32 (of
float8: float32, as the matrix unit has it), all else is float32: the numbers of `linear_dynamic` in fxquant/ops.

float8 is e4m3fn or e5m2. Where a target has no such instruction its codes are decoded in registers: on sm80 to float16,
on gfx942 to its own kind, in which the same bits are half the value, and -0 becomes 0. Both are exact; but there the
codes of NaN and, on gfx942, of infinity are numbers: no quantizer makes them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fxquant.numerics.tiles import part_width
from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.epilogue import epilogue_meta
from fxquant.triton_kernels.grouped_float8 import FNUZ, HALF, NATIVE, float8_products
from fxquant.triton_kernels.grouped_kernels import grouped_products
from fxquant.triton_kernels.grouped_splits import sum_of_splits
from fxquant.triton_kernels.integer_parts import inflation
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import interpreted, launch, output
from fxquant.triton_kernels.operands import LinearOperands

NAME = "grouped_mm"
FIELDS = (
    *("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "GROUP_M"),
    *("WORDS", "BIASED", "FLOAT8", "num_warps", "num_stages"),
)
FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
SMALLEST_GROUP = 16
NARROWEST_DOT, WIDEST_DOT = 32, 128
LOAD = 16  # bytes
TENSOR_MEMORY = 512  # columns of it that a processor of sm100 has
FEWEST_LEFT = 64  # rows of x from which on it is the left operand: what an instruction of a warp group takes
SUM_COLUMNS = 256
MOST_CANDIDATES = 8
# 128 * 128 * 65536 = 2**30, and with a zero point of 8 bits off 2**31 - 2**23: what a granule may sum up in int32.
MOST_IN_INT32 = 65536
# The same bits of an fnuz float8 mean half as much.
_FACTORS = {NATIVE: 1.0, FNUZ: 4.0}
_HALF_BIAS = {"float8_e4m3fn": 2.0**8, "float8_e5m2": 1.0}  # float16's exponent bias over the format's


def run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """y [M, N] in the operands' dtype."""
    spec, x_spec = TensorSpec.parse(operands.spec), TensorSpec.parse(operands.x_spec)
    m, n, k = operands.x.shape[0], operands.out_features, operands.in_features
    y = output([m, n], operands.dtype, operands.x.device)
    if operands.x_scale is None or 0 in (m, n):
        return y
    meta, is_float = config.meta, spec.format.kind == "float"
    group, step, splits = max(spec.granularity.size, x_spec.granularity.size), meta["BLOCK_K"], meta["SPLIT_K"]
    whole = group == 0
    target = y if splits == 1 else output([splits, m, n], torch.int32 if whole else torch.float32, y.device)
    x_scale, residual = operands.x_scale.contiguous(), operands.residual
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    stride_rm = 0 if residual is None else residual.stride(0)
    ends = {
        "X_SCALE": {"token": "row", "group": "group"}.get(x_spec.granularity.kind, "one"),
        "SPLIT_K": splits,
        **epilogue_meta(operands.bias, residual, operands.activation),
    }
    all_steps, granule_steps = triton.cdiv(k, step), max(1, group // step)
    steps = triton.cdiv(triton.cdiv(all_steps, splits), granule_steps) * granule_steps
    granules = 1 if whole else triton.cdiv(k, group)
    factor = _factor(spec, x_spec, meta["FLOAT8"])
    function, arguments, constants = (_float8 if is_float else _integers)(operands, spec, x_spec, x_scale, meta, group)
    launch(
        function,
        (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]), splits),
        *arguments[:4],
        *(x_scale, operands.bias, residual, target, m, n, k, granules),
        *arguments[4:],
        *(stride_rm, all_steps, steps, factor),
        GROUP=group,
        STEP=step,
        EVEN_K=k % step == 0,
        **constants,
        **ends,
        **{name: meta[name] for name in ("BLOCK_M", "BLOCK_N", "GROUP_M", "num_warps", "num_stages")},
    )
    if splits > 1:
        block_m = min(triton.next_power_of_2(m), 8)
        launch(
            sum_of_splits,
            (triton.cdiv(m, block_m), triton.cdiv(n, SUM_COLUMNS)),
            *(target, operands.scale, x_scale, operands.bias, residual, y, m, n, m * n, stride_rm, factor),
            WHOLE=whole,
            BLOCK_M=block_m,
            BLOCK_N=SUM_COLUMNS,
            num_warps=4,
            **ends,
        )
    return y


Arguments = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a function, its first arguments, its constexprs


def _integers(
    operands: LinearOperands, spec: TensorSpec, x_spec: TensorSpec, x_scale: Tensor, meta: dict[str, int], group: int
) -> Arguments:
    x = operands.x if operands.x.stride(-1) == 1 else operands.x.contiguous()
    # Some pointer to bytes, where there is no zero point.
    zero = operands.tiles if operands.zero_point is None else operands.zero_point
    part, width = _widths(spec, group, meta["BLOCK_K"])
    columns = operands.tiles.shape[1] * 8 // spec.format.bits
    constants = {
        "BITS": spec.format.bits,
        "AFFINE": spec.has_zero_point,
        "WORDS": bool(meta["WORDS"]) and not interpreted(),
        "BIASED": bool(meta["BIASED"]) and _stays_small(spec, group, meta["BLOCK_K"]),
        "PART": part,
        "WIDTH": width,
        "MASK_TILES": columns % meta["BLOCK_K"] != 0,
    }
    strides = (x.stride(0), operands.tiles.stride(0), x_scale.stride(0))
    return grouped_products, (x, operands.tiles, operands.scale, zero, *strides), constants


def _float8(
    operands: LinearOperands, spec: TensorSpec, x_spec: TensorSpec, x_scale: Tensor, meta: dict[str, int], group: int
) -> Arguments:
    x = operands.x if operands.x.stride(-1) == 1 else operands.x.contiguous()
    tiles = operands.tiles.view(spec.code_dtype)
    if meta["FLOAT8"] != NATIVE:
        x, tiles = x.view(torch.uint8), operands.tiles
    x_left = meta["BLOCK_M"] >= FEWEST_LEFT
    rows = spec.granularity.rows
    scaled_x = "row" if x_spec.granularity.kind == "group" else "no"
    scaled_n = "one" if rows and rows % meta["BLOCK_N"] == 0 else "row"
    x_side = (x, x_scale, x.stride(0), (x_scale.stride(0), 1), x_spec, scaled_x)
    n_side = (tiles, operands.scale, tiles.stride(0), (1, operands.scale.stride(0)), spec, scaled_n)
    left, right = (x_side, n_side) if x_left else (n_side, x_side)
    constants = {
        "LEFT_E5M2": left[4].format.name == "float8_e5m2",
        "RIGHT_E5M2": right[4].format.name == "float8_e5m2",
        "LEFT_SCALED": left[5],
        "RIGHT_SCALED": right[5],
        "X_LEFT": x_left,
        "FLOAT8": meta["FLOAT8"],
        "WORDS": bool(meta["WORDS"]) and not interpreted(),
        "WIDTH": _widths(spec, group, meta["BLOCK_K"])[1],
    }
    return float8_products, (left[0], right[0], left[1], right[1], left[2], right[2], *left[3], *right[3]), constants


def _widths(spec: TensorSpec, group: int, step: int) -> tuple[int, int]:
    """Columns of a part of the tiles, and of one dot."""
    bits = spec.format.bits
    widest = part_width(bits) if bits < 8 else min(step, WIDEST_DOT)
    width = max(NARROWEST_DOT, min(widest, group or widest))
    return (widest if bits < 8 else width), width


def _stays_small(spec: TensorSpec, group: int, step: int) -> bool:
    """Sums of a granule in one step are below 2**22: 128 * 128 * 255, or with an 8-bit zero point 128 * 255 * 128."""
    if group == 0 or spec.format.kind != "int":
        return False
    return min(group, step) <= 128 or spec.format.bits < 8


def _factor(spec: TensorSpec, x_spec: TensorSpec, float8: int) -> float:
    if spec.format.kind == "int":
        return 1 / inflation(spec.format.bits, spec.has_zero_point)
    if float8 == HALF:
        return _HALF_BIAS[spec.format.name] * _HALF_BIAS[x_spec.format.name]
    return _FACTORS[float8]


def _why_not(problem: Problem, arch: Arch) -> str:
    if problem.op != "linear" or not problem.activations:
        return "it multiplies codes: x must be quantized"
    spec, x_spec = TensorSpec.parse(problem.weights), TensorSpec.parse(problem.activations)
    size, x_size = spec.granularity.size, x_spec.granularity.size
    if spec.scale not in ("float32", "bfloat16") or x_spec.scale not in ("float32", "bfloat16"):
        return f"scales are float32 or bfloat16, not {spec.scale} and {x_spec.scale}"
    if spec.scheme == "shift" or x_spec.scheme != "symmetric":
        return "a weight is symmetric or affine, x symmetric"
    if x_spec.granularity.kind not in ("token", "tensor", "group") or (x_size and x_size != size):
        met = f"{x_spec.granularity} beside {spec.granularity}"
        return f"x is scaled by token, tensor or the weight's groups, not by {met}"
    if size and (size & (size - 1) or size < SMALLEST_GROUP):
        return f"groups are powers of two from {SMALLEST_GROUP}, not {size}"
    if spec.format.kind == "int":
        return _why_no_integers(problem, spec, x_spec)
    return _why_no_float8(spec, x_spec)


def _why_no_integers(problem: Problem, spec: TensorSpec, x_spec: TensorSpec) -> str:
    if x_spec.format.name != "int8":
        return f"integer codes are multiplied with int8, not {x_spec.format}"
    if spec.format.bits == 8 and not spec.granularity.size and not spec.has_zero_point:
        return "one symmetric 8-bit granule a row needs no groups: scaled_mm has it"
    if not spec.granularity.size and problem.k > MOST_IN_INT32:
        return f"one granule sums up at most {MOST_IN_INT32} products, not {problem.k}"
    return ""


def _why_no_float8(spec: TensorSpec, x_spec: TensorSpec) -> str:
    for side in (spec, x_spec):
        if side.format.name not in FLOAT8_FORMATS:
            return f"floats are {' or '.join(FLOAT8_FORMATS)}, not {side.format}"
    return "" if spec.granularity.size else "one granule a row needs no groups: scaled_mm has it"


# By the rows of x that they are for: BLOCK_M, BLOCK_N, warps; best guess first.
_TILES = (
    (16, ((16, 64, 4), (16, 128, 4), (16, 32, 4))),
    (32, ((32, 64, 4), (32, 128, 4), (16, 64, 4))),
    (64, ((64, 64, 4), (64, 128, 8), (32, 128, 4), (16, 64, 4))),
    (0, ((128, 128, 8), (64, 128, 8), (128, 64, 8), (64, 64, 4), (32, 128, 4), (32, 64, 4), (16, 64, 4))),
)
_OF_FEWER_WARPS = (64, 128, 4)  # for AMD's, of 64 threads


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    """Tiles by the rows of x, each with the steps along K that the formats allow and that fit the shared memory."""
    spec, x_spec = TensorSpec.parse(problem.weights), TensorSpec.parse(problem.activations)
    group = max(spec.granularity.size, x_spec.granularity.size)
    nvidia = arch.backend == "cuda"
    modes = {
        "WORDS": int(nvidia),
        # Only there a conversion of integers to floats is slow: 16 a clock and processor.
        "BIASED": int(arch.name == "sm80"),
        "FLOAT8": NATIVE if arch.float8 and nvidia else FNUZ if arch.float8 else HALF,
    }
    tiles = next(tiles for rows, tiles in _TILES if problem.m <= rows or not rows)
    if not nvidia and problem.m > _OF_FEWER_WARPS[0]:
        tiles = (_OF_FEWER_WARPS, *tiles)
    found: list[KernelConfig] = []
    for bm, bn, warps in tiles:
        for step in _steps(spec, group, bm):
            # Triton 3.9 compiles a trap where sums, of which each granule of a step has its own, need more than that.
            if arch.name == "sm100" and bm * (step // group if group else 1) >= TENSOR_MEMORY:
                continue
            stages = min(5 if bm <= 32 else 4, arch.shared_per_block // _stage_bytes(spec, bm, bn, step))
            stages = stages if nvidia else 2
            if stages >= 2 and 2 * _stage_bytes(spec, bm, bn, step) <= arch.shared_per_block:
                for split in _splits(problem, arch, bm, bn, step):
                    values = {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": step, "SPLIT_K": split, "GROUP_M": 8}
                    found.append(KernelConfig.of(NAME, **values, **modes, num_warps=warps, num_stages=stages))
    # Only those that read 16 bytes of the weight a thread, if any does.
    width = _widths(spec, group, WIDEST_DOT)[1]
    wide = [one for one in found if one["BLOCK_N"] * width >= LOAD * one["num_warps"] * arch.warp_size]
    return tuple(dict.fromkeys(wide or found))[:MOST_CANDIDATES]


def _steps(spec: TensorSpec, group: int, bm: int) -> tuple[int, ...]:
    """Columns of a step, best guess first: whole chunks of the tiles; of a granule as many as a sum may hold."""
    match spec.format.bits:
        case 8:
            return (128, 64) if group == 0 or group > 64 else (64, 128)
        case 4:
            return (256, 128) if bm <= 32 else (128, 256) if bm <= 64 or group == 0 else (128,)
        case _:
            return (256,)


def _stage_bytes(spec: TensorSpec, bm: int, bn: int, step: int) -> int:
    """Shared memory of one step: x, codes, and the codes widened."""
    return step * bm + step * bn * spec.format.bits // 8


def _splits(problem: Problem, arch: Arch, bm: int, bn: int, step: int) -> tuple[int, ...]:
    """Into how many parts K is cut: enough to keep all processors busy, of four steps at least."""
    programs = triton.cdiv(problem.m, bm) * triton.cdiv(problem.n, bn)
    split = 1
    while programs * split * 2 <= 2 * arch.board.processors and split < 16 and problem.k >= split * 2 * 4 * step:
        split *= 2
    return (split, 1) if split > 1 else (1,)


GROUPED_MM = TritonKernel(
    NAME,
    "linear",
    FIELDS,
    _why_not,
    _candidates,
    run,
    "codes times codes, scaled by groups along K: int8 with 2- to 8-bit integers, float8 by blocks",
)
