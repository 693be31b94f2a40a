"""Reading PTX: what machine code no longer shows, which is divisions by a number that a loop does not change (their
reciprocal moves out of the loop, the rest looks like any arithmetic) and the shapes of tcgen05's products.

Source: "Parallel Thread Execution ISA", sections on mma, wgmma, and the instruction descriptor of tcgen05.mma.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from fxquant.tuning.facts.loops import Instruction, hot_loop

_LABEL = re.compile(r"^\s*([$\w]+):")
_STATEMENT = re.compile(r"^[\s{]*(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
_TARGET = re.compile(r"(\$L\w+)")
_DIVISION = re.compile(r"(div|rem)\.[us](16|32|64)$")
_DENSE = re.compile(r"(?:mma\.sync|wgmma\.mma_async)\.\S+")
_BLOCKWIDE = re.compile(r"tcgen05\.mma\b.*?\.kind::(\w+)")
_DEPTH = {"i8": 32, "f16": 16, "tf32": 8, "f8f6f4": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
_LOADS = ("ld.global", "cp.async.c", "cp.async.bulk")
_MODIFIERS = ("sync", "aligned", "row", "col", "satfinite")


def parse(text: str) -> list[Instruction]:
    """The instructions of all functions; jumps to labels of inline assembly, which only poll, are left out."""
    code: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        line = line.partition("//")[0]
        if found := _LABEL.match(line):
            labels.append(found[1])
            line = line[found.end() :]
        found = _STATEMENT.match(line)
        if found is None:
            continue
        predicate, name, operands = found.groups()
        jump = name.partition(".")[0] == "bra"
        target = _TARGET.search(operands) if jump else None
        if jump and target is None:
            continue
        falls = bool(predicate) or name.partition(".")[0] not in ("bra", "ret", "exit", "trap")
        code.append(Instruction(tuple(labels), name, operands.strip(), (target[1],) if target else (), falls))
        labels = []
    return code


def is_matrix(instruction: Instruction) -> bool:
    return bool(_DENSE.match(instruction.name) or _BLOCKWIDE.match(instruction.name))


def divisions_of(text: str) -> int:
    """Integer divisions and remainders in the hot loop. Those by constants have become multiplications already."""
    body, _ = hot_loop(parse(text), is_matrix, lambda i: i.name.startswith(_LOADS))
    return sum(bool(_DIVISION.match(i.name)) for i in body)


def matrix_of(text: str) -> dict[str, int]:
    """Matrix instructions of the whole text by name, shape and types, such as 'mma.m16n8k32.s32.s8.s8.s32'."""
    code = parse(text)
    constants = _constants(code)
    counts: Counter[str] = Counter()
    for instruction in filter(is_matrix, code):
        if _BLOCKWIDE.match(instruction.name):
            kind, (m, n, k) = _blockwide(instruction, constants)
            counts[f"tcgen05.mma.{kind}.m{m}n{n}k{k}"] += 1
        else:
            parts = instruction.name.replace("mma_async", "").split(".")
            counts[".".join(part for part in parts if part and part not in _MODIFIERS)] += 1
    return dict(sorted(counts.items()))


def blockwide_operations(text: str) -> int:
    """Multiplications and additions of one tcgen05.mma, the largest if they differ; 0 without."""
    code = parse(text)
    constants = _constants(code)
    shapes = [_blockwide(i, constants)[1] for i in code if _BLOCKWIDE.match(i.name)]
    return max((2 * m * n * k for m, n, k in shapes), default=0)


def _constants(code: list[Instruction]) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for instruction in code:
        if instruction.name == "mov.b32":
            register, _, value = instruction.operands.partition(",")
            if value.strip().lstrip("-").isdigit():
                found[register.strip()] = int(value) & 0xFFFFFFFF
    return found


def _blockwide(instruction: Instruction, constants: Mapping[str, int]) -> tuple[str, tuple[int, int, int]]:
    """Kind and (m, n, k) of a tcgen05.mma: m and n are fields of its instruction descriptor, a constant."""
    found = _BLOCKWIDE.match(instruction.name)
    assert found is not None
    kind = found[1]
    registers = re.findall(r"%r\d+", instruction.operands.partition("]")[2])
    descriptor = next((constants[r] for r in registers if r in constants), 0)
    n = (descriptor >> 17 & 0x3F) * 8
    m = (descriptor >> 27 & 0x3) * 128 if kind.startswith("mx") else (descriptor >> 24 & 0x1F) * 16
    return kind, (m, n, _DEPTH.get(kind, 0))
