"""Products with int8 codes, the same on every device and under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

# 127 * 127 * 1040 < 2**24: so many products of codes sum up exactly in float32, in whatever order (and in TF32 or
# bf16 too, which hold the codes exactly). Integer matrix products are missing or saturate on some devices; float32 ones
# are everywhere, and fast.
EXACT_IN_FLOAT32 = 1024
# The packed form keeps the sum of each column's codes in int32: 127 * 2**24 < 2**31.
MAX_IN_FEATURES = 2**24


def int8_matmul(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """int8 codes [M, K] times int8 codes [N, K] transposed -> int64 [M, N], exact for |code| <= 127."""
    total = torch.zeros(codes.shape[0], weight_codes.shape[0], dtype=torch.int64, device=codes.device)
    for start in range(0, codes.shape[1], EXACT_IN_FLOAT32):
        part = slice(start, start + EXACT_IN_FLOAT32)
        total += matmul_float32(codes[:, part], weight_codes[:, part]).to(torch.int64)
    return total


def matmul_float32(x: Tensor, weight_codes: Tensor) -> Tensor:
    """x [M, K] times weight_codes [N, K] transposed, both widened to float32 -> float32 [M, N].

    The bits do not depend on the strides of x: a matrix library sums a transposed operand in another order.
    """
    # Autocast reaches into an op's reference, and would round sums to bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        return x.float().contiguous() @ weight_codes.float().t()
