"""Files of problems: the shapes that `fxquant tune` and `fxquant kernels` are asked about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fxquant.errors import InvalidSpec, NotAPlanFile, UnknownFormat
from fxquant.spec import TensorSpec
from fxquant.target import Problem

_WHAT = "list of problems"
_FIELDS = [field.name for field in dataclasses.fields(Problem)]
_DEFAULTS: dict[str, Any] = {"op": "linear", "m": 0, "n": 0, "weights": "", "activations": "", "extra": ""}


def read_problems(file: Path) -> list[Problem]:
    """The problems of a JSON file: a list of objects with `Problem`'s fields, or {"problems": [...]}.

    k and dtype must be there. Without m, or with 0, a problem stands for every number of rows.
    Raises `NotAPlanFile`: it can't be read, or an entry is no problem.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotAPlanFile(file, _WHAT, str(error)) from error
    entries = content.get("problems") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise NotAPlanFile(file, _WHAT, "it should be a list with at least one entry, or an object with 'problems'")
    return [problem_of(entry, file, f"entry {at}") for at, entry in enumerate(entries)]


def problem_of(fields: Any, source: object, place: str) -> Problem:
    """One problem of a file or a command line; raises `NotAPlanFile` naming the source and the place in it."""
    if not isinstance(fields, dict):
        raise NotAPlanFile(source, _WHAT, f"{place} is no object")
    if unknown := set(fields) - set(_FIELDS):
        raise NotAPlanFile(source, _WHAT, f"{place} has the field {min(unknown)!r}; there are {', '.join(_FIELDS)}")
    if missing := [name for name in ("k", "dtype") if name not in fields]:
        raise NotAPlanFile(source, _WHAT, f"{place} has no field {missing[0]!r}")
    problem = Problem(**{**_DEFAULTS, **fields})
    for name in ("m", "n", "k"):
        size = getattr(problem, name)
        if not isinstance(size, int) or size < (1 if name == "k" else 0):
            raise NotAPlanFile(source, _WHAT, f"{place}: {name} is {size!r}, no size")
    if problem.op not in ("linear", "quantize", "embedding"):
        raise NotAPlanFile(source, _WHAT, f"{place}: op is {problem.op!r}; it takes linear, quantize or embedding")
    if problem.dtype not in ("float32", "bfloat16", "float16"):
        raise NotAPlanFile(source, _WHAT, f"{place}: dtype is {problem.dtype!r}; it takes float32, bfloat16 or float16")
    try:
        weights, activations = (spec and str(TensorSpec.parse(spec)) for spec in (problem.weights, problem.activations))
    except (InvalidSpec, UnknownFormat) as error:
        raise NotAPlanFile(source, _WHAT, f"{place}: {error}") from error
    return dataclasses.replace(problem, weights=weights, activations=activations)  # as lookups spell them
