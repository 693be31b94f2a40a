"""From a configuration to its facts: record the launches, compile each, read the machine code."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from fxquant.errors import DisassemblyFailed, KernelNotCompiled
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels.launching import Launch
from fxquant.tuning.compiling import launches_of, specialized
from fxquant.tuning.facts import cache, gcn, ptx, sass
from fxquant.tuning.facts.record import Facts, LaunchFacts, launch_from_json, launch_to_json
from fxquant.tuning.occupancy import TENSOR_COLUMNS


def facts_of(problem: Problem, config: KernelConfig, arch: Arch) -> Facts:
    """What compiling says about a configuration on an architecture, from the user's cache or by compiling it here.

    Facts don't depend on sizes but through what the launcher makes of them (constants, divisibility): problems that
    differ in no more share a file. Triton's errors pass: a tile that cannot be compiled raises. Raises
    `KernelNotCompiled` where the compiler has left something out, and `DisassemblyFailed`.
    """
    about = {"problem": str(problem), "config": config.to_json(), "arch": arch.name, "triton": triton.__version__}
    return Facts(tuple(launch_facts(launch, arch, about) for launch in launches_of(problem, config)))


def launch_facts(launch: Launch, arch: Arch, about: dict[str, Any] | None = None) -> LaunchFacts:
    """The facts of one recorded launch."""
    wanted = specialized(launch, arch)
    path = cache.path_of(wanted.key)
    kept = cache.read(path, launch_from_json)
    if kept is not None:
        return kept
    made = _read(wanted.compiled(), arch)
    cache.write(path, launch_to_json(made), {**(about or {}), "key": wanted.key})
    return made


def _read(compiled: Any, arch: Arch) -> LaunchFacts:
    metadata = compiled.metadata
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    if tensor_memory > TENSOR_COLUMNS:  # Triton makes a trap of it, and says nothing
        raise KernelNotCompiled(
            compiled.name, arch.name, f"it wants {tensor_memory} of {TENSOR_COLUMNS} columns of tensor memory"
        )
    if arch.backend == "hip":
        text = compiled.asm["amdgcn"]
        if lost := gcn.lost_assembly(text, compiled.asm["llir"]):
            raise KernelNotCompiled(compiled.name, arch.name, f"LLVM left out {lost} pieces of inline assembly")
        registers, spills, bulk, intermediate = gcn.registers_of(text), gcn.spills_of(text), 0, {}
        loop = gcn.loop_of(text, metadata.num_warps, compiled.asm["llir"])
    else:
        text, code = disassembled(compiled.asm["cubin"]), compiled.asm["ptx"]
        registers, intermediate = sass.registers_of(text), ptx.matrix_of(code)
        spills, bulk = (sass.count_of(field, text) for field in ("local", "bulk_copies"))
        loop = sass.loop_of(text, metadata.num_warps, ptx.blockwide_operations(code), ptx.divisions_of(code))
    return LaunchFacts(
        function=compiled.name,
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        warps=metadata.num_warps,
        tensor_memory=tensor_memory,
        bulk_copies=bulk,
        intermediate=intermediate,
        loop=loop,
    )


def disassembled(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin, by the cuobjdump that comes with Triton. Raises `DisassemblyFailed`."""
    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        try:
            done = subprocess.run(
                [tool, "-sass", "--dump-resource-usage", str(file)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise DisassemblyFailed(tool, str(error)) from error
    if done.returncode:
        raise DisassemblyFailed(tool, done.stderr.strip() or f"exit code {done.returncode}")
    return done.stdout
