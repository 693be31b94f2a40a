"""The ops as C functions of the kernels' library, for code that Inductor generates in C++: csrc/shims.h defines them.

Called so, an op costs about a microsecond less than through the dispatcher, which boxes each argument.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch

_C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "int": "int64_t",
    "float": "double",
    "bool": "int32_t",
    "str": "const char*",
    "ScalarType": "int32_t",
}
_OPS = (
    "attention",
    "embedding_dequantize",
    "embedding_packed",
    "int8_linear",
    "int8_linear_dynamic",
    "int8_linear_static",
    "int8_linear_weight_only",
    "linear_dynamic",
    "linear_weight_only",
    "rotary",
    "shared",
)


class Shims(dict[Any, list[str]]):
    """C declarations by overload. Inductor's caches pickle their settings, which an overload does not allow."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        overloads = [getattr(torch.ops.fxquant, name).default for name in self._names]
        super().__init__({overload: [_declaration(overload._schema)] for overload in overloads})

    def __reduce__(self) -> tuple[Any, ...]:
        return Shims, (self._names,), tuple(chain(*self.values()))  # the words only make the cache's key

    def __setstate__(self, declarations: tuple[str, ...]) -> None:
        """They follow from the names."""


@functools.cache
def shim_declarations() -> Shims:
    """The C declaration of each op that has one: Inductor's setting "custom_ops_to_c_shims"."""
    return Shims(_OPS)


def _declaration(schema: torch.FunctionSchema) -> str:
    arguments = ", ".join([*(_c_type(argument) for argument in schema.arguments), "AtenTensorHandle*"])
    return f"AOTITorchError (*const aoti_torch_cpu_{schema.name.removeprefix('fxquant::')})({arguments})"


def _c_type(argument: Any) -> str:
    kind = argument.real_type  # `type` calls a dtype an int
    optional = isinstance(kind, torch.OptionalType)
    return _C_TYPES[str(kind.getElementType() if optional else kind)] + "*" * optional
