"""TritonKernel: everything that lowering, tuning and tests must know about one kernel."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxquant.target import Arch, KernelConfig, Op, Problem
from fxquant.triton_kernels.operands import EmbeddingOperands, LinearOperands, QuantizeOperands

Operands = LinearOperands | QuantizeOperands | EmbeddingOperands


@dataclass(frozen=True)
class TritonKernel:
    """One kernel, or two that only work together.

    why_not     empty if it takes the problem on that architecture, else what was met and what it wants.
    candidates  configurations for the problem, best guess first; none of them is out of the question by shape alone.
    run         the launcher: operands and a configuration to result tensors.
    fields      names of a configuration's values, in order.
    summary     one line for `fxquant kernels list`.
    """

    name: str
    op: Op
    fields: tuple[str, ...]
    why_not: Callable[[Problem, Arch], str]
    candidates: Callable[[Problem, Arch], tuple[KernelConfig, ...]]
    run: Callable[[Any, KernelConfig], Any]
    summary: str

    def heuristic(self, problem: Problem, arch: Arch) -> KernelConfig:
        """The configuration to take where nothing is known."""
        return self.candidates(problem, arch)[0]

    @property
    def source_hash(self) -> str:
        """Of this kernel's module and all of the package that it can reach: tables of another source don't count."""
        return _source_hash(self.run.__module__)

    def config(self, *values: int) -> KernelConfig:
        """A configuration by its values, in the order of `fields`."""
        return KernelConfig(self.name, tuple(zip(self.fields, values, strict=True)))


def _source_hash(module: str) -> str:
    seen: dict[str, str] = {}
    todo = [module]
    package = __name__.rpartition(".")[0]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        source = inspect.getsource(sys.modules[name])
        seen[name] = source
        todo += [other for other in sys.modules if other.startswith(f"{package}.") and f"import {other}" in source]
        todo += [other for other in sys.modules if other.startswith(f"{package}.") and f"from {other} " in source]
    text = "".join(seen[name] for name in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
