"""Which class quantizes which module: the table that `register_module` extends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import nn

from fxquant.errors import NotAQuantizedClass
from fxquant.nn.base import QModule

Kind = TypeVar("Kind", bound=type[QModule])
_CLASSES: dict[type[nn.Module], type[QModule]] = {}
# Classes of libraries that may not be installed, by module and name; looked up once they have been imported.
_LATE: dict[tuple[str, str], Callable[[type[nn.Module]], type[QModule]]] = {}
# Classes that are known by what they are made with, whatever their names: a test, and the quantized class.
_BY_INTERFACE: list[tuple[Callable[[type[nn.Module]], bool], type[QModule]]] = []


def register_module(base: type[nn.Module]) -> Callable[[Kind], Kind]:
    """A class decorator: modules of class `base` are quantized as the decorated class, a subclass of both.

    Subclasses of `base` with no forward of their own are too; the last registration of a class counts.

    Raises:
        NotAQuantizedClass: the decorated class is no subclass of `QModule` and of `base`, in this order.
    """

    def register(kind: Kind) -> Kind:
        mro = kind.__mro__ if isinstance(kind, type) else ()
        if QModule not in mro or base not in mro or mro.index(QModule) > mro.index(base):
            raise NotAQuantizedClass(kind, base)
        _CLASSES[base] = kind
        quantized_class.cache_clear()
        return kind

    return register


def register_late(module: str, name: str) -> Callable[[Kind], Kind]:
    """The same for a class of a library that may not be there; the decorated class gets it as its second base."""

    def register(kind: Kind) -> Kind:
        _LATE[module, name] = lambda base: type(kind.__name__, (kind, base), {"__reduce_ex__": _reduce})
        return kind

    return register


def register_interface(is_known: Callable[[type[nn.Module]], bool]) -> Callable[[Kind], Kind]:
    """The same for all classes of which `is_known` is true; they become the second base of the decorated class."""

    def register(kind: Kind) -> Kind:
        _BY_INTERFACE.append((is_known, kind))
        quantized_class.cache_clear()
        return kind

    return register


@cache
def quantized_class(cls: type[nn.Module]) -> type[QModule] | None:
    """The class that modules of class `cls` are quantized as; None if there is none. A quantized class is its own."""
    if issubclass(cls, QModule):
        return cls
    for base in cls.__mro__:
        found = _CLASSES.get(base) or _late(base)
        if found is None:
            continue
        if _methods(cls) != _methods(base):
            return None
        return found if cls is base else _subclassed(found, cls)
    found = _of_interface(cls)
    return None if found is None else _subclassed(found, cls)


def why_none(cls: type[nn.Module]) -> str:
    """Why modules of class `cls` have no quantized class, in words; empty for those that hold no product at all."""
    known = any(base in _CLASSES or _late(base) or _of_interface(base) for base in cls.__mro__)
    return "" if not known else f"{cls.__name__} has a forward of its own, which is left as it is"


def _late(base: type[nn.Module]) -> type[QModule] | None:
    make = _LATE.get((base.__module__, base.__qualname__))
    if make is None or getattr(sys.modules.get(base.__module__), base.__name__, None) is not base:
        return None
    return _CLASSES.setdefault(base, make(base))


def _of_interface(cls: type) -> type[QModule] | None:
    return next((kind for is_known, kind in _BY_INTERFACE if issubclass(cls, nn.Module) and is_known(cls)), None)


def _methods(cls: type) -> tuple[Any, ...]:
    """What must be torch's own for the quantized class to compute the same."""
    return tuple(getattr(cls, name, None) for name in ("forward", "_conv_forward"))


def _subclassed(found: type[QModule], cls: type[nn.Module]) -> type[QModule]:
    return type(f"Q{cls.__name__}", (found, cls), {"__reduce_ex__": _reduce, "__module__": cls.__module__})


def _reduce(self: QModule, protocol: Any) -> tuple[Any, ...]:
    """Classes made at run time have no name to be found under: a pickle holds the one that they quantize."""
    original = type(self).__mro__[-1]
    for cls in type(self).__mro__:
        if not issubclass(cls, QModule) and issubclass(cls, nn.Module):
            original = cls
            break
    return _revive, (original,), self.__dict__.copy()


def _revive(original: type[nn.Module]) -> QModule:
    kind = quantized_class(original)
    assert kind is not None
    return object.__new__(kind)
