"""The tables of `fxquant kernels inspect`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table
from triton.errors import TritonError

from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels import TritonKernel
from fxquant.tuning.facts import Facts, HotLoop, facts_of, occupancy
from fxquant.tuning.model import Modelled, modelled_time

MICRO = 1e6


@dataclass(frozen=True)
class Row:
    """A configuration for a problem, or why there is nothing to say of it."""

    problem: Problem
    why_not: str = ""
    config: KernelConfig | None = None
    facts: Facts | None = None
    modelled: Modelled | None = None


def inspected(kernel: TritonKernel, problem: Problem, arch: Arch, every: bool) -> Iterator[Row]:
    """Compile the heuristic's configuration, or every candidate; a problem without m is taken with 1024 rows."""
    problem = problem if problem.m else problem.with_m(1024)
    why_not = "another operation" if problem.op != kernel.op else kernel.why_not(problem, arch)
    if why_not:
        yield Row(problem, f"not taken: {why_not}")
        return
    configs = kernel.candidates(problem, arch) if every else (kernel.heuristic(problem, arch),)
    for config in configs:
        try:
            facts = facts_of(problem, config, arch)
        except TritonError as error:  # one candidate of several: the others are shown
            yield Row(problem, f"{config} does not compile: {type(error).__name__}: {error}".partition("\n")[0])
            continue
        if not facts.launches:
            yield Row(problem, "torch's own kernel: nothing of ours is compiled")
            continue
        yield Row(problem, "", config, facts, modelled_time(problem, config, arch, facts))


def tables(rows: Iterable[Row], arch: Arch) -> list[Table]:
    """Resources and modelled time; then what the hot loop of each configuration does."""
    resources = Table(
        "", "problem", "configuration", "launch", "registers", "spills", "shared", "blocks", "modelled", "roofline",
        "bound by", title=f"{arch}, times on one {arch.board.name}, modelled, not measured",
    )  # fmt: skip
    loops = Table("", "configuration", "launch", "matrix instructions", "memory", "others", title="hot loop of a warp")
    for number, row in enumerate(rows, 1):
        if row.config is None or row.facts is None or row.modelled is None:
            resources.add_row(str(number), str(row.problem), row.why_not)
            continue
        for launch in row.facts.launches:
            main = launch is row.facts.main
            fits = occupancy(launch, arch)
            resources.add_row(
                str(number),
                str(row.problem),
                str(row.config),
                launch.function,
                str(launch.registers),
                str(launch.spills),
                str(launch.shared),
                f"{fits.blocks} ({fits.limited_by})",
                _time(row.modelled.seconds) if main else "",
                _time(row.modelled.roofline.attainable) if main else "",
                row.modelled.bound_by if main else "",
            )
            loops.add_row(str(number), str(row.config), launch.function, *_cells(launch.loop))
    return [resources, loops]


_MEMORY = {
    "async_copies": "cp.async", "bulk_copies": "TMA", "global_loads": "load", "global_stores": "store",
    "matrix_loads": "ldmatrix", "shared_loads": "shared load", "shared_stores": "shared store", "atomics": "atomic",
    "local": "local",
}  # fmt: skip
_OTHERS = ("barriers", "divisions", "integer", "floating", "conversions", "total")


def _time(seconds: float) -> str:
    return "not known" if math.isinf(seconds) else f"{seconds * MICRO:.1f} µs"


def _cells(loop: HotLoop) -> tuple[str, str, str]:
    fields = dataclasses.asdict(loop)
    matrix = "\n".join(f"{count} {name}" for name, count in loop.matrix.items()) or "none"
    memory = "\n".join(line for field, word in _MEMORY.items() for line in _lines(word, fields[field]))
    others = ", ".join(f"{fields[name]} {name}" for name in _OTHERS)
    return matrix, memory, others if loop.is_loop else f"{others} (no loop)"


def _lines(word: str, counts: int | Mapping[int, int]) -> list[str]:
    if isinstance(counts, Mapping):
        return [f"{count} {word} of {width} B" for width, count in counts.items()]
    return [f"{counts} {word}"] if counts else []
