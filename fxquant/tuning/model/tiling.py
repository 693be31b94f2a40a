"""How a configuration cuts a problem into blocks, and each block's way along K into iterations."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fxquant.numerics.tiles import chunk_width
from fxquant.spec import TensorSpec
from fxquant.target import KernelConfig, Problem
from fxquant.tuning.model.work import BYTES_OF, weight_bytes, x_bytes


@dataclass(frozen=True)
class Tiling:
    """A grid of blocks; each makes a tile [block_m, block_n] of the result over a share of K.

    along_m, along_n, split_k  blocks in each direction. group_m: blocks along m that follow each other.
    step        columns of K in an iteration. iterations: of a block.
    x_line, w_line  bytes of one row of x, and of the weight, in one column of K, scales among them; may be fractions.
    result_bytes  of one result that a block writes. useful: the share of all blocks' results that the problem wants.
    ahead       iterations whose loads to registers are started before they are needed.
    programs    of a launch whose programs make one block after another: how many there are; else 0. specialized: other
                warps of them load the next block while the last one's results are written.
    """

    block_m: int
    block_n: int
    along_m: int
    along_n: int
    split_k: int
    group_m: int
    step: int
    iterations: int
    x_line: float
    w_line: float
    result_bytes: int
    useful: float
    ahead: int = 1
    programs: int = 0
    specialized: bool = False

    @property
    def blocks(self) -> int:
        return self.along_m * self.along_n * self.split_k

    @property
    def loaded(self) -> float:
        """Bytes of both operands that a block loads in an iteration."""
        return (self.block_m * self.x_line + self.block_n * self.w_line) * self.step


def tiling_of(problem: Problem, config: KernelConfig) -> Tiling:
    """The tiling of a configuration, by those of its fields that are named BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, GROUP_M,
    AHEAD, NUM_PROGRAMS and SPECIALIZE.

    Of a kernel without BLOCK_M one block has all rows; without BLOCK_K an iteration takes a chunk of the weight's
    tiles (`fxquant.numerics.tiles`).
    """
    meta = config.meta
    m, k = max(problem.m, 1), problem.k
    if problem.op != "linear":
        return _rows_tiling(problem, meta)
    block_m, block_n = meta.get("BLOCK_M", m), meta.get("BLOCK_N", problem.n)
    split_k = meta.get("SPLIT_K", 1)
    step = meta.get("BLOCK_K") or chunk_width(TensorSpec.parse(problem.weights).format.bits)
    along_m, along_n = -(-m // block_m), -(-problem.n // block_n)
    return Tiling(
        block_m=block_m,
        block_n=block_n,
        along_m=along_m,
        along_n=along_n,
        split_k=split_k,
        group_m=meta.get("GROUP_M", along_m),
        step=step,
        iterations=ceil(ceil(k / step) / split_k),
        x_line=x_bytes(problem.with_m(m)) / (m * k),
        w_line=weight_bytes(problem) / (problem.n * k),
        result_bytes=BYTES_OF[problem.dtype] if split_k == 1 else 4,
        useful=m * problem.n / (along_m * block_m * along_n * block_n),
        ahead=meta.get("AHEAD", 1),
        programs=meta.get("NUM_PROGRAMS", 0),
        specialized=bool(meta.get("SPECIALIZE", 0)),
    )


def _rows_tiling(problem: Problem, meta: dict[str, int]) -> Tiling:
    """Of a kernel that goes through rows of x: a block has BLOCK_M of them and reads each once."""
    rows = meta.get("BLOCK_M", 1)
    step = min(meta.get("BLOCK_K", problem.k), problem.k)
    width = BYTES_OF[problem.dtype]
    return Tiling(
        block_m=rows,
        block_n=problem.k,
        along_m=-(-max(problem.m, 1) // rows),
        along_n=1,
        split_k=1,
        group_m=1,
        step=step,
        iterations=-(-problem.k // step),
        x_line=float(width),
        w_line=0.0,
        result_bytes=width,
        useful=1.0,
    )
