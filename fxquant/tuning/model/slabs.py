"""Kernels that write a slab of the weight out in a half type before they multiply it: field SLAB, rows of one.

Each slab has two launches. The first reads codes and scales and writes halves, the second is a plain product of them.
"""

from __future__ import annotations

import dataclasses
import math

from fxquant.numerics.tiles import chunk_width
from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.decoded_weight import BLOCK_ROWS
from fxquant.tuning.facts.record import Facts, LaunchFacts
from fxquant.tuning.model.work import BYTES_OF, weight_bytes


def products_of(problem: Problem, config: KernelConfig) -> list[tuple[Problem, int]]:
    """The plain products, floats by floats, and how many there are of each: those of whole slabs and of the last one.

    None of a kernel that multiplies codes themselves.
    """
    rows = config.meta.get("SLAB", 0)
    if not rows:
        return []
    whole, rest = divmod(problem.n, rows)
    sizes = [(size, count) for size, count in ((rows, whole), (rest, 1)) if size and count]
    return [(dataclasses.replace(problem, n=size, weights=""), count) for size, count in sizes]


def of_product(config: KernelConfig) -> KernelConfig:
    """The configuration of one slab's product."""
    return KernelConfig(config.kernel, tuple(pair for pair in config.values if pair[0] != "SLAB"))


def decoding(problem: Problem, arch: Arch, facts: Facts) -> float:
    """Seconds in which the whole weight is decoded: by bytes to and from memory or by instructions, whichever more."""
    board = arch.board
    first = next(launch for launch in facts.launches if launch is not facts.main)
    halves = problem.n * problem.k * BYTES_OF[problem.dtype]
    moving = (weight_bytes(problem) + halves) / (board.bandwidth * board.attainable)
    return max(moving, _issuing(problem, arch, first))


def _issuing(problem: Problem, arch: Arch, launch: LaunchFacts) -> float:
    chunk = chunk_width(TensorSpec.parse(problem.weights).format.bits)
    blocks = math.ceil(problem.n / BLOCK_ROWS) * math.ceil(problem.k / chunk)
    threads = launch.warps * arch.warp_size
    arithmetic = sum(getattr(launch.loop, kind) * threads / lanes for kind, lanes in arch.lanes.items())
    cycles = max(launch.loop.total * launch.warps / arch.issued, arithmetic)
    return cycles * blocks / arch.board.processors / (arch.board.clock * 1e9)
