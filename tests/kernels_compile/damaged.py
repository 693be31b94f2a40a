"""A small int8 product, right and damaged: does the check of facts see it?"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.launching import launch, recorded
from fxquant.tuning.facts import Facts, launch_facts

SIZE, GROUP = 1024, 48
NO_OPTIONS: Mapping[str, int] = MappingProxyType({})
PROBLEM = Problem("linear", SIZE, SIZE, SIZE, "int8/channel", "int8/token", "float32")


@triton.jit
def product(
    x_ptr,  # [M, K] int8
    w_ptr,  # [N, K] int8
    scale_ptr,  # [ceil(K / GROUP)] float32
    y_ptr,  # [M, N] float32
    M, N, K, group, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DIVIDES: tl.constexpr, MULTIPLIES: tl.constexpr,
):  # fmt: skip
    """y = x times w, transposed. DIVIDES: finds a scale by a division in the loop. MULTIPLIES: not by tl.dot."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (rows % M)[:, None] * K + along[None, :]
    w_at = w_ptr + (cols % N)[:, None] * stride_w + along[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        x, w = tl.load(x_at), tl.load(w_at)
        if MULTIPLIES:
            sums += tl.sum(x.to(tl.int32)[:, None, :] * w.to(tl.int32)[None, :, :], 2)
        else:
            sums = tl.dot(x, w.T, sums, out_dtype=tl.int32)
        if DIVIDES:
            sums += tl.load(scale_ptr + k // group).to(tl.int32)
        x_at += BLOCK_K
        w_at += BLOCK_K
    at = rows[:, None] * N + cols[None, :]
    tl.store(y_ptr + at, sums.to(tl.float32), mask=(rows[:, None] < M) & (cols[None, :] < N))


def facts_of_product(
    config: KernelConfig,
    arch: Arch,
    *,
    divides: bool = False,
    multiplies: bool = False,
    stride: int = SIZE,
    options: Mapping[str, int] = NO_OPTIONS,
) -> Facts:
    """Compile it, with options of Triton's. A `stride` of w that is odd lets no row but the first be aligned."""
    with torch.device("meta"):
        x, w = torch.empty(SIZE, SIZE, dtype=torch.int8), torch.empty(SIZE, stride, dtype=torch.int8)
        scale, y = torch.empty(SIZE // GROUP + 1), torch.empty(SIZE, SIZE)
    with recorded() as launches:
        launch(
            product, (1, 1), x, w, scale, y, SIZE, SIZE, SIZE, GROUP, stride,
            DIVIDES=divides, MULTIPLIES=multiplies, **config.meta, **options,
        )  # fmt: skip
    return Facts((launch_facts(launches[0], arch),))
