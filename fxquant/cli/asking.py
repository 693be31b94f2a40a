"""What commands are asked about: a target, kernels by name, problems from a file or a command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.errors import InvalidOption, UnknownKernel

if TYPE_CHECKING:
    from fxquant.target import Arch, Problem
    from fxquant.triton_kernels import TritonKernel

Target = Annotated[str, typer.Option("--target", help="Architecture: sm80, sm89, sm90, sm100 or gfx942.")]
Shapes = Annotated[Path | None, typer.Option("--shapes", help="JSON file with a list of problems.")]
OneProblem = Annotated[
    str | None,
    typer.Option(
        "--problem",
        help="One problem: its size as MxNxK, then words such as w=int8/channel x=int8/token dtype=bfloat16 "
        "op=quantize extra=rmsnorm. M may be '*': any number of rows.",
    ),
]

_SIZE = re.compile(r"(\d+|\*)x(\d+)x(\d+)")
_WORDS = {"w": "weights", "x": "activations", "dtype": "dtype", "op": "op", "extra": "extra"}


def kernel_named(name: str) -> TritonKernel:
    """The kernel of that name; raises `UnknownKernel` with the nearest."""
    from fxquant.triton_kernels import KERNELS

    if name not in KERNELS:
        raise UnknownKernel(name, list(KERNELS))
    return KERNELS[name]


def arch_to_compile(name: str) -> Arch:
    """The architecture of that name. Raises `InvalidOption`: there is none, or nothing can be compiled here."""
    from fxquant.target import arch_named
    from fxquant.triton_kernels.launching import interpreted

    if interpreted():
        raise InvalidOption("TRITON_INTERPRET", "1", "Triton's interpreter compiles nothing; unset this variable")
    return arch_named(name)


def problems_asked(shapes: Path | None, problem: str | None) -> list[Problem]:
    """The problems of the file or of the text; empty if neither is given.

    Raises `InvalidOption` if both are or the text can't be read, `NotAPlanFile` for the file.
    """
    from fxquant.tuning.problems import read_problems

    if shapes is not None and problem is not None:
        raise InvalidOption("problem", problem, "it goes with no --shapes; give one of the two")
    if shapes is not None:
        return read_problems(shapes)
    return [problem_in(problem)] if problem is not None else []


def problem_in(text: str) -> Problem:
    """A problem out of '512x4096x4096 w=int8/channel x=int8/token dtype=bfloat16'."""
    from fxquant.tuning.problems import problem_of

    size, *words = text.split()
    found = _SIZE.fullmatch(size)
    if found is None:
        raise InvalidOption("problem", text, "it starts with MxNxK, such as 512x4096x4096 or *x4096x4096")
    m, n, k = found.groups()
    fields: dict[str, Any] = {"m": 0 if m == "*" else int(m), "n": int(n), "k": int(k), "dtype": "bfloat16"}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _WORDS or not value:
            raise InvalidOption("problem", text, f"{word!r} is none of {', '.join(f'{key}=' for key in _WORDS)}")
        fields[_WORDS[name]] = value
    return problem_of(fields, "--problem", text)
