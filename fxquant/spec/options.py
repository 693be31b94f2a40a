"""Checks of single options of `QuantConfig`: each takes what a user wrote and gives the field, or raises."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fxquant.errors import InvalidOption, nearest
from fxquant.spec.linears import MAX_GROUP_SIZE


def one_of(option: str, value: object, known: tuple[str, ...]) -> str:
    """A word of a list."""
    if isinstance(value, str) and value in known:
        return value
    near = nearest(str(value), known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise InvalidOption(option, value, f"it takes {', '.join(repr(k) for k in known)}{hint}")


def flag(option: str, value: object) -> bool:
    """True or False, and nothing that only counts as such."""
    if isinstance(value, bool):
        return value
    raise InvalidOption(option, value, "it takes True or False")


def folder(option: str, value: object) -> str | None:
    """The path of a folder, or None."""
    if value is None:
        return None
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return str(os.fspath(value))
    raise InvalidOption(option, value, "it takes the path of a folder")


def globs(option: str, value: object) -> tuple[str, ...]:
    """One glob over module paths, or several."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if all(isinstance(glob, str) and glob for glob in found):
        return tuple(str(glob) for glob in found)
    raise InvalidOption(option, value, "it takes a glob over module paths, or a sequence of them")


def size_of_group(value: object) -> int | None:
    """How many neighbours share a scale, or None. A group larger than a row is one group a row."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_GROUP_SIZE:
        return value
    raise InvalidOption("group_size", value, f"it takes a whole number of at least 1 and at most {MAX_GROUP_SIZE}")
