"""Which bytes of a launch come from memory, and which of them an earlier block has left in the cache."""

from __future__ import annotations

import math

from fxquant.target import Problem
from fxquant.tuning.model.tiling import Tiling
from fxquant.tuning.model.work import work_of


def memory_bytes(problem: Problem, tiling: Tiling, cache: int, *, held: int) -> float:
    """Bytes that all blocks together read from memory or write to it, `held` of them at a time.

    Blocks of one wave share what they load. From wave to wave an operand stays in the cache if half of the cache holds
    it (the other half is the other operand's, and the result's, that go through); else each wave reads its part anew.
    """
    work = work_of(problem)
    if problem.op != "linear":
        return float(work.bytes)
    k = problem.k
    x_whole, w_whole = max(problem.m, 1) * k * tiling.x_line, problem.n * k * tiling.w_line
    waves = math.ceil(tiling.blocks / held)
    tall, wide = _shape_of(tiling, held)
    x_wave = min(tall * tiling.block_m * k * tiling.x_line, x_whole)
    w_wave = min(wide * tiling.block_n * k * tiling.w_line, w_whole)
    x_read = x_whole if x_whole <= cache / 2 else max(x_whole, waves * x_wave)
    w_read = w_whole if w_whole <= cache / 2 else max(w_whole, waves * w_wave)
    rest = work.bytes - x_whole - w_whole  # result and bias
    partial = tiling.split_k * max(problem.m, 1) * problem.n * tiling.result_bytes if tiling.split_k > 1 else 0
    left = partial if partial > cache / 2 else 0  # partial sums that do not stay in the cache
    return x_read + w_read + rest + left


def _shape_of(tiling: Tiling, held: int) -> tuple[int, int]:
    """Blocks along m and along n of one wave: `group_m` along m, then along n, then the next group."""
    tall = min(tiling.group_m, tiling.along_m)
    tiles = max(held // tiling.split_k, 1)
    wide = min(-(-tiles // tall), tiling.along_n)
    return min(max(tall, -(-tiles // wide)), tiling.along_m), wide
