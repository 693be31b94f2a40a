"""Loops of machine code: basic blocks, dominators, natural loops; the same for every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction: where others jump to reach it, its name with all suffixes, operands, and where it may jump.

    labels   names of the place. targets: labels that it may go to. falls: it may also go on to the next.
    """

    labels: tuple[str, ...]
    name: str
    operands: str = ""
    targets: tuple[str, ...] = ()
    falls: bool = True


Body = tuple[Instruction, ...]


def hot_loop(
    code: Sequence[Instruction], is_matrix: Callable[[Instruction], bool], is_load: Callable[[Instruction], bool]
) -> tuple[Body, bool]:
    """The instructions of the hot loop (see `HotLoop`), and whether it is a loop."""
    loops = [tuple(code[i] for i in sorted(indices)) for indices in innermost(code)]
    for wanted in (is_matrix, is_load):
        best = max(loops, key=lambda body: sum(map(wanted, body)), default=())
        if any(map(wanted, best)):
            return best, True
        if any(map(wanted, code)):  # it is there, but in no loop: none of the loops is hot
            break
    return tuple(code), False


def innermost(code: Sequence[Instruction]) -> list[set[int]]:
    """Of each natural loop the indices of its own instructions: those that are in no loop within it.

    An inner loop that only waits (a few instructions that poll a barrier) stays a part of the loop around it.
    """
    if not code:
        return []
    blocks = _blocks(code)
    after = _successors(code, blocks)
    loops = _natural_loops(after)
    sizes = [sum(len(blocks[b]) for b in body) for body in loops]
    found = []
    for body in loops:
        inner = [other for other, size in zip(loops, sizes, strict=True) if other < body and size > _WAITING]
        own = body.difference(*inner) if inner else body
        found.append({i for block in own for i in blocks[block]})
    return found


_WAITING = 8  # a loop of fewer instructions does no work


def _blocks(code: Sequence[Instruction]) -> list[range]:
    starts = {0}
    aimed = {label for instruction in code for label in instruction.targets}
    for i, instruction in enumerate(code):
        if aimed.intersection(instruction.labels):
            starts.add(i)
        if (instruction.targets or not instruction.falls) and i + 1 < len(code):
            starts.add(i + 1)
    edges = [*sorted(starts), len(code)]
    return [range(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _successors(code: Sequence[Instruction], blocks: Sequence[range]) -> list[list[int]]:
    place = {label: b for b, block in enumerate(blocks) for label in code[block[0]].labels}
    after: list[list[int]] = []
    for b, block in enumerate(blocks):
        last = code[block[-1]]
        nexts = [place[label] for label in last.targets if label in place]
        if last.falls and b + 1 < len(blocks):
            nexts.append(b + 1)
        after.append(nexts)
    return after


def _natural_loops(after: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """Bodies by header; two loops with one header are one."""
    before: dict[int, set[int]] = {b: set() for b in range(len(after))}
    for b, nexts in enumerate(after):
        for other in nexts:
            before[other].add(b)
    dominators = _dominators(after, before)
    bodies: dict[int, set[int]] = {}
    for b in dominators:
        for header in after[b]:
            if header in dominators[b]:
                body = bodies.setdefault(header, {header})
                _reach_back(b, body, before, dominators)
    return [frozenset(body) for body in bodies.values()]


def _reach_back(start: int, body: set[int], before: dict[int, set[int]], reachable: Iterable[int]) -> None:
    todo = [start]
    while todo:
        block = todo.pop()
        if block not in body:
            body.add(block)
            todo += [b for b in before[block] if b in reachable]


def _dominators(after: Sequence[Sequence[int]], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached, the blocks on every way to it, itself among them."""
    order, seen = [], {0}
    todo = [0]
    while todo:
        block = todo.pop()
        order.append(block)
        for other in after[block]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    dominators = {b: set(seen) for b in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = {b} | set.intersection(*(dominators[p] for p in before[b] if p in dominators))
            if new != dominators[b]:
                dominators[b], changed = new, True
    return dominators
