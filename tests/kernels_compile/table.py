"""The committed table of facts: which rows it has, reading and writing it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from fxquant.target import ARCHS, Arch, KernelConfig, Problem
from fxquant.triton_kernels import KERNELS
from fxquant.tuning.facts import Facts, facts_of
from fxquant.tuning.representative import representative_of

PATH = Path(__file__).parent / "facts.json"
COMMAND = "python -m tests.kernels_compile.regenerate"
# All but those whose product is torch's: such kernels have nothing to configure.
OURS = [kernel.name for kernel in KERNELS.values() if kernel.fields]
# Besides a kernel's first problem: activations that take another matrix instruction.
MORE: dict[str, tuple[str, ...]] = dict.fromkeys(("scaled_mm", "scaled_mm_persistent"), ("float8_e4m3fn/token",))


@dataclass(frozen=True)
class Row:
    """A kernel's own choice for a problem on a target."""

    kernel: str
    arch: Arch
    problem: Problem

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.arch.name}: {self.problem}".replace("×", "x")  # an id of a test, too

    @property
    def config(self) -> KernelConfig:
        return KERNELS[self.kernel].heuristic(self.problem, self.arch)

    def facts(self) -> Facts:
        return facts_of(self.problem, self.config, self.arch)


def rows() -> Iterator[Row]:
    """Of each kernel and target the most telling problems; none where a kernel does not run."""
    for kernel in OURS:
        for arch in ARCHS.values():
            problems = representative_of(kernel, arch)
            more = [p for x in MORE.get(kernel, ()) for p in problems if p.activations == x][
                : len(MORE.get(kernel, ()))
            ]
            for problem in dict.fromkeys(problems[:1] + more):
                yield Row(kernel, arch, problem)


def read() -> dict[str, Any]:
    """{'triton': version, 'rows': {key: {'config': ..., 'launches': [...]}}}"""
    return json.loads(PATH.read_text(encoding="utf-8"))


def write(found: Mapping[str, tuple[KernelConfig, Facts]]) -> None:
    """Sorted, one line for what is read together: so that a diff shows what has changed."""
    lines = ["{", f' "triton": {json.dumps(triton.__version__)},', ' "rows": {']
    for at, (key, (config, facts)) in enumerate(sorted(found.items())):
        lines += [f"  {json.dumps(key, ensure_ascii=False)}: {{", f'   "config": {json.dumps(config.to_json())},']
        lines += ['   "launches": [', *_launches(facts), "   ]", "  }" + ("," if at + 1 < len(found) else "")]
    lines += [" }", "}", ""]
    PATH.write_text("\n".join(lines), encoding="utf-8")


def _launches(facts: Facts) -> Iterator[str]:
    launches = facts.to_json()
    for at, launch in enumerate(launches):
        loop = launch.pop("loop")
        yield f"    {json.dumps(launch)[:-1]},"
        yield f'     "loop": {json.dumps(loop)}}}' + ("," if at + 1 < len(launches) else "")
