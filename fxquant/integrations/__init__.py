"""At home in other libraries: each module here needs its library, and is imported on demand only."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fxquant.errors import PackageMissing

# What `fxquant` has beside its own names, by name: the module here, and the library that it needs.
LAZY = {
    "FxQuantConfig": ("transformers", "transformers"),
    "QuantizedModelForCausalLM": ("transformers_models", "transformers"),
}


def lazy(name: str) -> Any:
    """The attribute of that name. Raises `PackageMissing` if its library is not installed."""
    module, library = LAZY[name]
    if find_spec(library) is None:
        raise PackageMissing(library, name)
    return getattr(import_module(f"{__name__}.{module}"), name)
