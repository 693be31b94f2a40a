"""The base of all errors, and the one that any part may raise."""

from __future__ import annotations

from typing import Any


def _rebuild(cls: type[FxQuantError], args: tuple[Any, ...], state: dict[str, Any]) -> FxQuantError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class FxQuantError(Exception):
    """Base of all errors that fxquant raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors take facts, not the message, so the default way through pickle would call them wrongly.
        return _rebuild, (type(self), self.args, self.__dict__)


class PackageMissing(FxQuantError, ImportError):
    """A package that only this feature needs, and that is not installed."""

    def __init__(self, package: str, what: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install {package}")
