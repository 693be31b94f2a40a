"""Shipped tables: configurations of one architecture's kernels that the model of time chose, one file each."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from fxquant.errors import NotAPlanFile
from fxquant.target import ARCHS, Problem
from fxquant.tuning.plans.cache import write_json
from fxquant.tuning.plans.compact import from_compact, to_compact
from fxquant.tuning.plans.records import Entries, Entry, merged

logger = logging.getLogger("fxquant")

TABLES = Path(__file__).parents[1] / "tables"


def table_path(arch: str, folder: Path = TABLES) -> Path:
    return folder / f"{arch}.json"


@functools.cache
def read_table(arch: str, folder: Path = TABLES) -> Entries:
    """The shipped entries of an architecture; of one that has no table those of the nearest older one of its maker's.

    Raises `NotAPlanFile` if the file is damaged: it is part of the package.
    """
    older: str | None = arch
    while older and not table_path(older, folder).exists():
        older = older_arch(older)
    if not older:
        return {}
    if older != arch:
        logger.info("no table for %s: configurations of %s are taken", arch, older)
    path = table_path(older, folder)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["arch"] != older:
            raise ValueError(f"arch {found['arch']!r}")
        entries: dict[Problem, Entry] = merged(from_compact(found))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotAPlanFile(path, "table of configurations", f"{type(error).__name__}: {error}") from error
    return entries


def write_table(arch: str, entries: Iterable[Entry], folder: Path = TABLES) -> Path:
    """Write the shipped table of an architecture; returns its path."""
    path = table_path(arch, folder)
    path.parent.mkdir(exist_ok=True)
    write_json(path, to_compact(arch, entries))
    read_table.cache_clear()
    return path


def older_arch(arch: str) -> str:
    """The next older architecture that kernels are written for, of the same maker; '' if there is none.

    `arch` need not be known: 'sm87' has 'sm80' before it.
    """
    number = _number(arch)
    if number is None:
        return ""
    known = {name: found for name in ARCHS if (found := _number(name)) is not None}
    older = [name for name, value in known.items() if value < number]
    return max(older, key=lambda name: known[name]) if older else ""


def _number(arch: str) -> int | None:
    digits = arch.removeprefix("sm")
    return int(digits) if arch.startswith("sm") and digits.isdigit() else None
