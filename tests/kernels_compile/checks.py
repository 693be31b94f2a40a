"""What must hold of a kernel's machine code on every target, and what must not change unseen."""

from __future__ import annotations

import re

from fxquant.spec import TensorSpec
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.coded_products import coded_meta
from fxquant.triton_kernels.operands import DTYPES
from fxquant.tuning.facts import Facts, HotLoop, LaunchFacts, occupancy

# A small change moves a few registers and instructions about; more than that is to be looked at.
REGISTERS, INSTRUCTIONS = 8, 0.15
WIDE = 16  # bytes of one access
HALF_BITS = 16  # of a weight that was written out before it is multiplied
# By what multiplies, the matrix instructions: of warps, warp groups, tensor memory; of AMD.
MATRIX = {
    "int8": r"IMMA|IGMMA|UTCIMMA|v_mfma_i32_\w+_i8",
    "float8": r"QMMA|QGMMA|UTCQMMA|v_mfma_f32_\w+_(fp8|bf8)\w*",
    "float4": r"OMMA|UTCOMMA|UTCQMMA",
    "half": r"HMMA|HGMMA|UTCHMMA|v_mfma_f32_\w+_?b?f16",
}
GROUP_ROWS = 64  # of a warp group's matrix instruction, and of tensor memory
# Kernels for a row or a few: a matrix instruction would compute rows that there are not. Their loop over a share of K
# may be written out, and x and scales are a good part of what they read: most of it must come wide.
VECTOR_KERNELS, MOSTLY = ("coded_mv",), 0.6
# Kernels whose product is of a part of a chunk of the weight, or of a group: of a few rows of x that is little.
PRODUCTS_OF_PARTS = ("coded_mm", "grouped_mm")
# Columns of a product with which 16 bytes a thread make the tile narrow: for more rows than that a wider one pays. It
# decodes the weight less often.
NARROW = 16


def complaints(problem: Problem, config: KernelConfig, facts: Facts, arch: Arch) -> list[str]:
    """What is wrong with a configuration that is to be run on an architecture; empty if nothing is."""
    found = [complaint for launch in facts.launches for complaint in _of_launch(launch, arch)]
    if problem.op == "linear":
        found += _of_loop(problem, config, facts, arch)
    return found


def _of_launch(launch: LaunchFacts, arch: Arch) -> list[str]:
    found = []
    if launch.spills:
        found.append(f"{launch.function} spills: {launch.spills}")
    if not occupancy(launch, arch).blocks:
        found.append(
            f"{launch.function} does not fit: {launch.registers} registers, {launch.shared} of "
            f"{arch.shared_per_block} bytes of shared memory"
        )
    return found


def _of_loop(problem: Problem, config: KernelConfig, facts: Facts, arch: Arch) -> list[str]:
    loop = facts.loop
    found = []
    vector = config.kernel in VECTOR_KERNELS
    if not (loop.is_loop or vector):
        found.append("no loop was found")
    if loop.divisions:
        found.append(f"{loop.divisions} integer divisions in the loop")
    if loop.local:
        found.append(f"{loop.local} accesses to local memory in the loop")
    if vector:
        return found if loop.wide_share >= MOSTLY else [*found, f"it reads in narrow pieces: {loop.read_bytes}"]
    return found + _of_matrix(problem, config, loop, arch) + _of_stream(problem, config, facts, arch)


def unit_of(problem: Problem, arch: Arch) -> str:
    """What should multiply: codes by codes where the target can, else halves."""
    if not problem.activations:
        return "half"
    x, w = TensorSpec.parse(problem.activations).format, TensorSpec.parse(problem.weights).format
    if x.kind == "int":
        return "int8"
    if not arch.float8 or arch.backend == "hip":  # gfx942's float8 is of another kind: it is decoded
        return "half"
    if x.bits == 4 and w.bits == 4:
        return "float4" if arch.scaled_dot else "half"
    return "float8"


def _of_matrix(problem: Problem, config: KernelConfig, loop: HotLoop, arch: Arch) -> list[str]:
    unit = unit_of(problem, arch)
    if not loop.matrix:
        return ["no matrix instruction in the loop"]
    units = [unit]
    if unit == "float8" and arch.tensor_maps and config.meta["BLOCK_M"] < GROUP_ROWS:
        units.append("half")  # Triton gives mma.sync halves there, which codes of float8 are exactly
    wrong = [name for name in loop.matrix if not any(re.match(MATRIX[unit], name) for unit in units)]
    return [f"{name} is no product of {unit}" for name in wrong]


def _of_stream(problem: Problem, config: KernelConfig, facts: Facts, arch: Arch) -> list[str]:
    """The weight must come 16 bytes at a time.

    Shown by the bytes that do: they are those of the weight, and of x where a product has 16 bytes of it for each
    thread. Or by those that don't: they are fewer than the weight has.
    """
    loop, meta = facts.loop, config.meta
    along = loop.operations / (2 * meta["BLOCK_M"] * meta["BLOCK_N"]) if loop.operations else meta.get("BLOCK_K", 0)
    threads = facts.main.warps * arch.warp_size
    bits = HALF_BITS if "SLAB" in meta else TensorSpec.parse(problem.weights).format.bits
    weight = meta["BLOCK_N"] * along * bits / 8 / threads
    wide = sum(size for width, size in loop.read_bytes.items() if width >= WIDE)
    narrow = sum(size for width, size in loop.read_bytes.items() if width < WIDE)
    if config.kernel in PRODUCTS_OF_PARTS:
        if meta.get("TMA") and facts.main.bulk_copies:
            return []
        dtype = DTYPES[problem.dtype]
        step = coded_meta(TensorSpec.parse(problem.weights), problem.k, dtype)["STEP"]
        if step == NARROW and problem.m > meta["BLOCK_M"]:
            return []
        item = 1 if problem.activations else dtype.itemsize
        x = meta["BLOCK_M"] * along * item / threads if meta["BLOCK_M"] * step * item >= WIDE * threads else 0
        if wide >= weight + x:
            return []
    if (wide < weight and not facts.main.bulk_copies) or narrow >= weight:
        return [f"of {weight:g} bytes of weight a thread, {wide} come wide, {narrow} narrow: {loop.read_bytes}"]
    return []


def differences(now: Facts, before: Facts) -> list[str]:
    """What has changed between two compilations: every exact fact, registers and instructions beyond a little."""
    if [a.function for a in now.launches] != [b.function for b in before.launches]:
        return [f"launches: {[b.function for b in before.launches]} -> {[a.function for a in now.launches]}"]
    return [line for a, b in zip(now.launches, before.launches, strict=True) for line in _changed(a, b)]


_EXACT = ("spills", "shared", "warps", "tensor_memory", "bulk_copies", "intermediate")
_EXACT_IN_LOOP = (
    "is_loop", "matrix", "operations", "matrix_loads", "async_copies", "bulk_copies", "global_loads", "divisions",
    "local", "atomics",
)  # fmt: skip


def _changed(now: LaunchFacts, before: LaunchFacts) -> list[str]:
    pairs = [(name, getattr(now, name), getattr(before, name)) for name in _EXACT]
    pairs += [(name, getattr(now.loop, name), getattr(before.loop, name)) for name in _EXACT_IN_LOOP]
    found = [f"{now.function}: {name}: {was} -> {value}" for name, value, was in pairs if value != was]
    if abs(now.registers - before.registers) > REGISTERS:
        found.append(f"{now.function}: registers: {before.registers} -> {now.registers}")
    if abs(now.loop.total - before.loop.total) > INSTRUCTIONS * before.loop.total:
        found.append(f"{now.function}: instructions: {before.loop.total} -> {now.loop.total}")
    return found
