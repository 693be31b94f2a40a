"""Reading SASS, NVIDIA's machine code, as `cuobjdump -sass` prints it.

What instructions do: "CUDA Binary Utilities", instruction set reference.
"""

from __future__ import annotations

import re

from fxquant.tuning.facts.loops import Instruction, hot_loop
from fxquant.tuning.facts.mix import Kind, counted
from fxquant.tuning.facts.record import HotLoop

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P(?:\d+|T))\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);", re.MULTILINE)
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)\b")
_REGISTERS = re.compile(r"\bREG:(\d+)")
_JUMPS = {"BRA", "JMP"}
_ENDS = {"EXIT", "RET", "BPT", "KILL"}

# By the part of the name before the first dot.
_GROUPS: dict[str, frozenset[str]] = {
    field: frozenset(names.split())
    for field, names in {
        "matrix": "IMMA HMMA QMMA OMMA BMMA DMMA IGMMA HGMMA QGMMA BGMMA UTCIMMA UTCHMMA UTCQMMA UTCOMMA UTCMXQMMA",
        "matrix_loads": "LDSM",
        "shared_loads": "LDS LDTM UTCCP",
        "shared_stores": "STS STSM STTM ATOMS",
        "async_copies": "LDGSTS",
        "bulk_copies": "UTMALDG UBLKCP UTMASTG UTMAPF",
        "global_loads": "LDG LD",
        "global_stores": "STG ST",
        "atomics": "ATOMG RED REDG ATOM UTMAREDG",
        "local": "LDL STL",
        "barriers": "BAR DEPBAR LDGDEPBAR SYNCS WARPGROUP WARPSYNC MEMBAR FENCE ERRBAR CCTL ARRIVES UTCBAR UTCATOMSWS "
        "UTMACMDFLUSH UTMACCTL",
        "conversions": "I2F I2FP F2I F2F F2FP I2I F2IP I2IP FRND",
        "control": "BRA JMP EXIT RET CALL BPT NOP BSSY BSYNC ELECT VOTEU VOTE NANOSLEEP YIELD KILL USETMAXREG",
        "integer": "IMAD IADD3 IADD UIADD3 VIADD IADD64 LOP3 ULOP3 PLOP3 UPLOP3 LEA ULEA SHF USHF SHL SHR SEL USEL "
        "ISETP UISETP PRMT UPRMT MOV UMOV MOVM SGXT USGXT BMSK P2R R2P IABS IMNMX VIMNMX VIMNMX3 UVIMNMX UIMAD UFLO "
        "FLO POPC BREV VABSDIFF IDP ISCADD REDUX SHFL MATCH S2R S2UR CS2R R2UR UP2UR UR2UP",
        "floating": "FMUL FMUL2 FADD FADD2 FFMA FFMA2 FSETP FSEL FMNMX FMNMX3 MUFU FSET FCHK HADD2 HMUL2 HFMA2 HSETP2 "
        "HSET2 HMNMX2 DFMA DADD DMUL DSETP FSWZADD",
    }.items()
}
_FIELD = {name: field for field, names in _GROUPS.items() for name in names}
_DIVISION = re.compile(r"I2F(\.U32|\.S32|\.U64|\.S64|\.U16)*\.RP")
_DENSE = re.compile(r"[IHQOBD]MMA\.(?:SP\.)?16(8)(\d+)")
_GROUP = re.compile(r"[IHQB]GMMA\.(\d+)x(\d+)x(\d+)")


def parse(text: str) -> list[Instruction]:
    """The instructions of a listing; labels are addresses in hexadecimal without leading zeros."""
    code = []
    for address, predicate, name, operands in _LINE.findall(text):
        base = name.partition(".")[0]
        targets: tuple[str, ...] = ()
        if base in _JUMPS and (found := _ADDRESS.search(operands)):
            targets = (found[1].lstrip("0") or "0",)
        # `BRA.U UP0, 0x220` has its predicate among the operands.
        conditional = bool(predicate) or (bool(targets) and "," in operands)
        falls = conditional or base not in _JUMPS | _ENDS
        code.append(Instruction((address.lstrip("0") or "0",), name, operands.strip(), targets, falls))
    return code


def kind_of(instruction: Instruction) -> Kind:
    base = instruction.name.partition(".")[0]
    field = _FIELD.get(base, "other")
    return field, _width(instruction.name)


def _width(name: str) -> int:
    parts = name.split(".")
    for part, size in (("256", 32), ("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if part in parts:
            return size
    return 4


def loop_of(text: str, warps: int, blockwide: int = 0, divisions: int = 0) -> HotLoop:
    """The hot loop of a listing. From the PTX: `blockwide`, operations of one UTC*MMA, and `divisions` in its loop."""
    body, is_loop = hot_loop(
        parse(text),
        lambda i: kind_of(i)[0] == "matrix",
        lambda i: kind_of(i)[0] in ("global_loads", "async_copies", "bulk_copies"),
    )
    divided = sum(bool(_DIVISION.match(i.name)) for i in body)
    operations = sum(_operations(i.name, warps, blockwide) for i in body)
    return counted(body, kind_of, is_loop, operations=operations, divisions=max(divided, divisions))


def _operations(name: str, warps: int, blockwide: int) -> int:
    """Of all warps of a block that run this instruction once each; of a warp group's by four warps together."""
    if found := _DENSE.match(name):
        return 2 * 16 * int(found[1]) * int(found[2]) * warps
    if found := _GROUP.match(name):
        return 2 * int(found[1]) * int(found[2]) * int(found[3]) * (warps // 4)
    return blockwide if _FIELD.get(name.partition(".")[0]) == "matrix" else 0


def count_of(field: str, text: str) -> int:
    """Instructions in the whole listing that are of a group: 'local', 'bulk_copies'."""
    return sum(kind_of(i)[0] == field for i in parse(text))


def registers_of(usage: str) -> int:
    """Registers of a thread, from what `cuobjdump --dump-resource-usage` prints."""
    return max(map(int, _REGISTERS.findall(usage)), default=0)
