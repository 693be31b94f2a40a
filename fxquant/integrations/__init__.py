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
    "QuantizedDiffusersModel": ("diffusers_models", "diffusers"),
    "compile_pipeline": ("diffusers_compile", "diffusers"),
}


def lazy(name: str) -> Any:
    """The attribute of that name. Raises `PackageMissing` if its library is not installed."""
    module, library = LAZY[name]
    if find_spec(library) is None:
        raise PackageMissing(library, name)
    if name == "FxQuantConfig" and find_spec("diffusers") is not None:
        import_module(f"{__name__}.diffusers")  # registers there as well: either library may be imported first
    return getattr(import_module(f"{__name__}.{module}"), name)
