"""What modules with several weights, none of which is called ``weight``, have in common."""

from __future__ import annotations

from typing import Any

from fxquant.nn.readonly import weight_to_read


def weight_property(name: str) -> Any:
    """The attribute of that name: the float parameter, or of a frozen module a dequantized copy, to read."""

    def read(module: Any) -> Any:
        if name in module._parameters:
            return module._parameters[name]
        if name not in module._forms:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
        return weight_to_read(module, name)

    return property(read)
