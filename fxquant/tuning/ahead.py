"""Compiling ahead of time: a folder of machine code with which a server starts warm, and a manifest of it.

The folder is a Triton cache. A launch looks for its code under a hash of the function's source, the arguments' types,
constants and known divisors, the options, the target, the environment and Triton itself; all of these are the same
here as on the GPU (`fxquant.tuning.compiling.specialized`), so with TRITON_CACHE_DIR set to the folder the first launch
loads. Triton's index in the folder holds whole paths: `at` says where the folder will lie.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.cache import FileCacheManager, _base32

from fxquant.errors import InvalidOption
from fxquant.target import Arch, KernelConfig, Plan, Problem
from fxquant.triton_kernels import KERNELS, Operands
from fxquant.triton_kernels.epilogue import ACTIVATIONS
from fxquant.triton_kernels.operands import LinearOperands
from fxquant.tuning.compiling import empty_operands, launches_of, specialized
from fxquant.tuning.plans.cache import replace_text
from fxquant.tuning.plans.device import version
from fxquant.tuning.plans.lookup import lookup

MANIFEST = "manifest.json"
FORMAT = 1
MULTIPLE = 16  # Triton compiles for numbers that are multiples of 16, for others, and for 1


@dataclass(frozen=True)
class Wanted:
    """A configuration, and a problem with one of the numbers of rows for which it is compiled."""

    problem: Problem
    config: KernelConfig


# What follows a linear's product: words joined by '+', of 'bias', 'residual' and the name of an activation function.
EPILOGUES = ("", "bias")
_WORDS = ("bias", "residual", *filter(None, ACTIVATIONS))


def operands_of(problem: Problem, epilogue: str) -> Operands:
    """Empty operands of a problem; of a linear with that epilogue. Raises `InvalidOption` for an unknown word."""
    operands = empty_operands(problem)
    if not isinstance(operands, LinearOperands):
        return operands
    words = {word for word in epilogue.split("+") if word}
    if unknown := words - {*_WORDS}:
        raise InvalidOption("epilogue", epilogue, f"{min(unknown)!r} is none of {', '.join(_WORDS)}, joined by '+'")
    residual = torch.empty(problem.m, problem.n, dtype=operands.dtype, device="meta")
    return dataclasses.replace(
        operands,
        bias=operands.bias if "bias" in words else None,
        residual=residual if "residual" in words else None,
        activation=next((word for word in ACTIVATIONS if word in words), ""),
    )


def with_quantizations(problems: Iterable[Problem]) -> list[Problem]:
    """The problems, and before each linear on codes the quantization that makes these; each for any number of rows."""
    found: dict[Problem, None] = {}
    for problem in problems:
        if problem.op == "linear" and problem.activations:
            found[dataclasses.replace(problem, op="quantize", m=0, n=0, weights="", extra="")] = None
        found[problem.with_m(0)] = None
    return list(found)


def wanted_of(problem: Problem, plan: Plan) -> list[Wanted]:
    """What a server may launch for a problem: with its m only that; without, every row of the plan, each with 1, a
    multiple of 16 and another number of rows, as far as they are in its range."""
    if problem.m:
        return [Wanted(problem, plan.row(problem.m).config)] if plan.rows else []
    found, above = [], 0
    for row in plan.rows:
        found += [Wanted(problem.with_m(m), row.config) for m in _examples(above, row.limit)]
        above = row.limit
    if plan.rows:  # the last row also serves what is above it, though not by a multiple of 16
        found.append(Wanted(problem.with_m(above + 1), plan.rows[-1].config))
    return found


def _examples(above: int, limit: int) -> list[int]:
    """Of the numbers from above + 1 to limit: 1, a multiple of 16, one that is neither."""
    multiple = limit // MULTIPLE * MULTIPLE
    other = next((m for m in (limit, limit - 1) if m % MULTIPLE and m > 1), 0)
    return [m for m in (1, other, multiple) if above < m <= limit]


def compile_ahead(
    problems: Sequence[Problem],
    arch: Arch,
    folder: Path,
    at: Path | None = None,
    *,
    epilogues: Sequence[str] = EPILOGUES,
    plans: Sequence[Plan] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Compile what the problems' plans launch into a folder, yielding a manifest entry for each kernel made.

    Linears are compiled with each of the `epilogues`. `plans`: one a problem; looked up if they are not given. The
    manifest is written when the iterator ends: a folder without one is not finished. Raises `InvalidOption` for an
    unknown epilogue or an `at` that is no absolute path; Triton's errors pass.
    """
    if at is not None and not at.is_absolute():
        raise InvalidOption("at", str(at), "Triton looks for its files by whole paths: give an absolute one")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    for number, problem in enumerate(problems):
        plan = plans[number] if plans is not None else lookup(problem, arch.name)
        of_problem = epilogues if problem.op == "linear" else ("",)
        for wanted, epilogue in itertools.product(wanted_of(problem, plan), of_problem):
            for launch in launches_of(wanted.problem, wanted.config, operands_of(wanted.problem, epilogue)):
                special = specialized(launch, arch)
                if special.key not in entries:
                    entries[special.key] = {**_compiled(special, wanted, folder), "epilogue": epilogue}
                    yield entries[special.key]
    target = at or folder
    _move_index(folder, target)
    manifest = {
        "format": FORMAT,
        "target": arch.name,
        "fxquant": version("fxquant"),
        "triton": triton.__version__,
        "environment": {"TRITON_CACHE_DIR": str(target)},
        "kernels": list(entries.values()),
    }
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _compiled(special: Any, wanted: Wanted, folder: Path) -> dict[str, Any]:
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        kernel = special.compiled()
        place = Path(FileCacheManager(_base32(kernel.hash)).cache_dir).relative_to(folder)
    binary = next(stage for stage in ("cubin", "hsaco") if stage in kernel.asm)
    return {
        "kernel": wanted.config.kernel,
        "problem": wanted.problem.to_json(),
        "config": wanted.config.to_json(),
        "source_hash": KERNELS[wanted.config.kernel].source_hash,
        "function": kernel.name,
        "signature": special.source.signature,
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "file": str(place / f"{special.source.name[:150]}.{binary}"),
    }


def _move_index(folder: Path, target: Path) -> None:
    """Let the whole paths in Triton's index files say where the folder will lie."""
    for file in folder.glob("*/__grp__*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        here = file.parent.relative_to(folder)
        content["child_paths"] = {name: str(target / here / name) for name in content["child_paths"]}
        replace_text(file, json.dumps(content))
