"""Reading AMD's assembly, as LLVM writes it for gfx942.

What instructions do: "AMD Instinct MI300 Instruction Set Architecture".
"""

from __future__ import annotations

import re

from fxquant.tuning.facts.loops import Instruction, hot_loop
from fxquant.tuning.facts.mix import Kind, counted
from fxquant.tuning.facts.record import HotLoop

_LABEL = re.compile(r"^([.\w$]+):")
_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*?)\s*$")
_SHAPE = re.compile(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?")
_BYTES = re.compile(r"(?:dwordx(\d)|dword|_(u?byte|sbyte)|_(u?short|sshort)|_b(\d+))")
_METADATA = re.compile(r"^\s+(?:- )?\.(vgpr_count|vgpr_spill_count):\s+(\d+)", re.MULTILINE)
_LLVM_LABEL = re.compile(r"^([\w.]+):")
_LLVM_TARGET = re.compile(r"label %([\w.]+)")
_LLVM_DIVISION = re.compile(r"= [us](?:div|rem) i\d+ [^,]+, %")
_LLVM_ASSEMBLY = re.compile(r"\bcall\b.* asm ")
_RECIPROCALS = ("v_rcp_iflag_f32", "s_rcp")

# The first whose start fits.
_FIELDS = (
    ("v_mfma", "matrix"), ("v_smfmac", "matrix"),
    ("ds_read_b64_tr", "matrix_loads"), ("ds_read", "shared_loads"), ("ds_load", "shared_loads"),
    ("ds_bpermute", "shared_loads"), ("ds_permute", "shared_loads"), ("ds_swizzle", "shared_loads"),
    ("ds_write", "shared_stores"), ("ds_store", "shared_stores"),
    ("global_atomic", "atomics"), ("buffer_atomic", "atomics"), ("flat_atomic", "atomics"),
    ("global_load_lds", "async_copies"),
    ("global_load", "global_loads"), ("buffer_load", "global_loads"), ("flat_load", "global_loads"),
    ("global_store", "global_stores"), ("buffer_store", "global_stores"), ("flat_store", "global_stores"),
    ("scratch_", "local"),
    ("buffer_wb", "barriers"), ("buffer_inv", "barriers"),
    ("s_barrier", "barriers"), ("s_waitcnt", "barriers"), ("s_sched", "control"), ("s_setprio", "control"),
    ("s_cbranch", "control"), ("s_branch", "control"), ("s_nop", "control"), ("s_endpgm", "control"),
    ("s_load", "control"), ("s_and_saveexec", "control"), ("s_sleep", "control"),
    ("v_cvt", "conversions"), ("v_med3_f", "floating"),
)  # fmt: skip
_FLOATING = re.compile(r"v_\w*(?:add|sub|mul|fma|max|min|mac|rcp|rsq|exp|log|sqrt|cmp|dot2)\w*_b?f(?:16|32|64)")


def parse(text: str) -> list[Instruction]:
    """The instructions of a listing, up to its metadata."""
    code: list[Instruction] = []
    labels: list[str] = []
    for line in text.partition(".amdgpu_metadata")[0].splitlines():
        line = line.partition(";")[0]
        if found := _LABEL.match(line):
            labels.append(found[1])
        elif found := _INSTRUCTION.match(line):
            name, operands = found.groups()
            jump = name.startswith(("s_cbranch", "s_branch"))
            falls = name not in ("s_branch", "s_endpgm", "s_setpc_b64")
            code.append(Instruction(tuple(labels), name, operands, (operands,) if jump else (), falls))
            labels = []
    return code


def kind_of(instruction: Instruction) -> Kind:
    name = instruction.name
    if name.startswith("buffer_load") and instruction.operands.endswith("lds"):
        return "async_copies", _width(name)
    for start, field in _FIELDS:
        if name.startswith(start):
            return field, _width(name)
    return ("floating" if _FLOATING.match(name) else "integer"), 0


def _width(name: str) -> int:
    found = _BYTES.search(name)
    if found is None:
        return 0
    dwords, byte, short, bits = found.groups()
    if bits:
        return int(bits) // 8
    return 1 if byte else 2 if short else 4 * int(dwords or 1)


def loop_of(text: str, warps: int, llvm: str = "") -> HotLoop:
    """The hot loop of a listing; divisions are counted in LLVM's code `llvm` too, where they still have their name."""
    body, is_loop = hot_loop(
        parse(text),
        lambda i: kind_of(i)[0] == "matrix",
        lambda i: kind_of(i)[0] in ("global_loads", "async_copies"),
    )
    divisions = max(sum(i.name.startswith(_RECIPROCALS) for i in body), divisions_of(llvm))
    operations = sum(_operations(i.name) for i in body) * warps
    return counted(body, kind_of, is_loop, operations=operations, divisions=divisions)


def _operations(name: str) -> int:
    found = _SHAPE.match(name)
    if found is None:
        return 0
    m, n, k = map(int, found.groups()[:3])
    return 2 * m * n * k * int(found[4] or 1)


def registers_of(text: str) -> int:
    """Vector registers of a thread, accumulators among them, from the metadata."""
    return _metadata(text).get("vgpr_count", 0)


def spills_of(text: str) -> int:
    return _metadata(text).get("vgpr_spill_count", 0)


def _metadata(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in _METADATA.findall(text)}


def lost_assembly(text: str, llvm: str) -> int:
    """How many pieces of inline assembly are in LLVM's code and not in the listing: LLVM only prints an error where it
    finds no registers for one, and goes on without it."""
    return max(0, len(_LLVM_ASSEMBLY.findall(llvm)) - text.count("#ASMSTART"))


def divisions_of(llvm: str) -> int:
    """Integer divisions and remainders in the hot loop of LLVM's code, but for those by constants."""
    body, _ = hot_loop(
        _parse_llvm(llvm),
        lambda i: "llvm.amdgcn.mfma" in i.operands,
        lambda i: "load" in i.name and "addrspace(1)" in i.operands,
    )
    return sum(i.name == "division" for i in body)


def _parse_llvm(text: str) -> list[Instruction]:
    code: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if found := _LLVM_LABEL.match(line):
            labels.append(found[1])
            continue
        line = line.strip()
        if line.startswith(("br ", "switch ", "ret ", "unreachable")):
            code.append(Instruction(tuple(labels), "br", "", tuple(_LLVM_TARGET.findall(line)), falls=False))
        elif _LLVM_DIVISION.search(line):
            code.append(Instruction(tuple(labels), "division", line))
        elif "llvm.amdgcn.mfma" in line or " load " in line:
            code.append(Instruction(tuple(labels), "load" if " load " in line else "call", line))
        elif line.startswith("%") and labels:
            code.append(Instruction(tuple(labels), "other", line))
        else:
            continue
        labels = []
    return code
