"""Words that messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None when none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def unknown(what: str, name: object, known: Sequence[str]) -> str:
    """That there is no such thing, what it may have meant, and what there is."""
    near = nearest(str(name), known)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}."


def sentence(words: str) -> str:
    """Words closed by a full stop, unless they ask something."""
    return words if words.endswith("?") else f"{words}."


def quoted(names: Iterable[str]) -> str:
    """Names in quotes, with commas between."""
    return ", ".join(repr(name) for name in names)


def listed(paths: Sequence[str]) -> str:
    """The first eight in quotes, and how many more there are."""
    return quoted(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
