"""scaled_mm_persistent: codes times codes where there are many tiles: each program makes several, one after the other.

Tiles are loaded by descriptor (TMA), so that no thread computes addresses, and the loads of a program's next tile
start while the last one is still being finished. For targets with tensor maps; rows of x must begin at multiples of 16
bytes. Results are those of scaled_mm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.kernel import TritonKernel
from fxquant.triton_kernels.launching import ALIGNED, launch, output
from fxquant.triton_kernels.operands import LinearOperands
from fxquant.triton_kernels.scaled_products import (
    add_products,
    codes_of,
    epilogue_args,
    for_descriptor,
    scales_of,
    store_scaled_halves,
    tile_of,
    why_not_scaled,
)
from fxquant.triton_kernels.scaled_tiles import PersistentTile, persistent_tiles_for

AS_IT_IS = tl.constexpr("")


@triton.jit(do_not_specialize=["M"])  # one kernel for any number of rows
def _scaled_mm_persistent(
    x_desc,
    w_desc,
    out_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    stride_xs,
    stride_rm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """x_desc: tiles [BLOCK_M, BLOCK_K] of codes [M, K]; w_desc: tiles [BLOCK_N, BLOCK_K] of codes [N, row of tiles],
    both 0 outside; int8 or float8. The rest as in `store_scaled`."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0),
        tiles,
        tl.num_programs(0),
        warp_specialize=SPECIALIZE,  # pyright: ignore[reportArgumentType]
    ):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            w = w_desc.load([col, k])
            acc = add_products(acc, x, w, AS_IT_IS, AS_IT_IS)
        store_scaled_halves(
            acc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, row, col, M, N, stride_xs, stride_rm, HALVES,
            HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


def _run(operands: LinearOperands, config: KernelConfig) -> Tensor:
    """The product of the operands, [M, N] in their dtype."""
    meta = config.meta
    x, w, _ = codes_of(operands)
    m, n, k = x.shape[0], operands.out_features, operands.in_features
    x, w = for_descriptor(x), for_descriptor(w)
    x_scale, scale, stride_xs = scales_of(operands)
    (bias, residual, stride_rm), epilogue = epilogue_args(operands)
    out = output((m, n), operands.dtype, x.device)
    if 0 in (m, n):
        return out
    tiles = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"])
    launch(
        _scaled_mm_persistent,
        (min(meta.pop("NUM_PROGRAMS"), tiles),),
        TensorDescriptor.from_tensor(x, [meta["BLOCK_M"], meta["BLOCK_K"]]),
        TensorDescriptor.from_tensor(w, [meta["BLOCK_N"], meta["BLOCK_K"]]),
        *(out, x_scale, scale, bias, residual, m, n, k, stride_xs, stride_rm),
        INTEGER=not x.dtype.is_floating_point,
        **meta,
        **epilogue,
    )
    return out


def _why_not(problem: Problem, arch: Arch) -> str:
    if reason := why_not_scaled(problem):
        return reason
    if not arch.tensor_maps:
        return f"{arch} loads no tiles by descriptor"
    if problem.k % ALIGNED:
        return f"rows of {problem.k} codes don't begin at multiples of {ALIGNED} bytes"
    return "" if persistent_tiles_for(problem, arch) else "there are too few tiles for a second one each"


def _candidates(problem: Problem, arch: Arch) -> tuple[KernelConfig, ...]:
    def config(one: PersistentTile) -> KernelConfig:
        tile, programs = one.tile, one.programs * arch.board.processors
        return SCALED_MM_PERSISTENT.config(
            tile.m, tile.n, tile.k, 8, programs, one.halves, one.specialize, tile.warps, tile.stages
        )

    return tuple(config(one) for one in persistent_tiles_for(problem, arch))


SCALED_MM_PERSISTENT = TritonKernel(
    name="scaled_mm_persistent",
    op="linear",
    fields=(
        "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "NUM_PROGRAMS", "HALVES", "SPECIALIZE", "num_warps", "num_stages",
    ),
    why_not=_why_not,
    candidates=_candidates,
    run=_run,
    summary="8-bit codes × 8-bit codes for many tiles: tiles loaded by descriptor, several a program",
)  # fmt: skip
