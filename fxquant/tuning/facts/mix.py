"""Counting the instructions of a loop by what they do, once an instruction set has said what each one is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from fxquant.tuning.facts.loops import Instruction
from fxquant.tuning.facts.record import HotLoop

# What an instruction does: the name of a field of HotLoop; of a field that is by width, the bytes too.
Kind = tuple[str, int]
BY_WIDTH = ("async_copies", "global_loads", "global_stores")


def counted(body: Iterable[Instruction], kind_of: Callable[[Instruction], Kind], is_loop: bool, **more: Any) -> HotLoop:
    """The mix of these instructions; `more` are fields that the instruction set counts in its own way."""
    plain: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    widths: dict[str, Counter[int]] = {field: Counter() for field in BY_WIDTH}
    total = 0
    for instruction in body:
        field, width = kind_of(instruction)
        total += 1
        if field == "matrix":
            matrix[instruction.name] += 1
        elif field in widths:
            widths[field][width] += 1
        else:
            plain[field] += 1
    by_width = {field: dict(sorted(counts.items())) for field, counts in widths.items()}
    return HotLoop(is_loop=is_loop, matrix=dict(sorted(matrix.items())), total=total, **by_width, **plain, **more)
