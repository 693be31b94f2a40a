"""Tools that need not be there: what is missing is said in a word, and the rest is measured."""

from __future__ import annotations

import importlib
from typing import Any


class Absent(RuntimeError):
    """A tool cannot be measured here, and why."""


def need(module: str, package: str | None = None) -> Any:
    """The module. Raises Absent, with the package's name, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise Absent(f"{name} is not installed (`make bench` installs it): {error}") from error
