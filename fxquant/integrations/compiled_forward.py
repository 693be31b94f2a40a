"""A module's forward compiled where it is: the module stays the object that it was, with its hooks around."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fxquant.backend import QuantizingBackend
from fxquant.errors import FxQuantError
from fxquant.fallback import tensor_names
from fxquant.report import ModelReport, parameter_facts
from fxquant.runner import Names
from fxquant.spec import QuantConfig

# Where accelerate keeps the forward that its hooks are around.
_INSIDE_HOOKS = "_old_forward"


class CompiledForward:
    """Stands in a module's `__dict__` for its `forward`. A copy of the module, or its pickle, compiles anew."""

    def __init__(
        self,
        module: nn.Module,
        plain: Callable[..., Any] | None,
        config: QuantConfig | None,
        running: QuantConfig,
        options: Mapping[str, Any],
    ) -> None:
        """plain: what is compiled, if it is not the forward of the module's class. The rest: see `compile_in_place`."""
        self._given = module, plain, config, running, options
        own = type(module).forward.__get__(module) if plain is None else plain
        functools.update_wrapper(self, own)  # its signature is asked for
        self.plain = own
        # Dynamo keeps the backend as long as the code of the module's class lives: it must not keep the module.
        names = partial(_names_of, weakref.ref(module))
        leave_float = partial(bool, config is None)
        self._backend = QuantizingBackend(config or running, names, leave_float=leave_float)
        self._compiled = torch.compile(own, backend=self._backend, isolate_recompiles=True, **options)  # pyright: ignore[reportCallIssue]

    @staticmethod
    def of(module: nn.Module) -> CompiledForward | None:
        """The one of that module, if it has one."""
        found = (module.__dict__.get(slot) for slot in (_INSIDE_HOOKS, "forward"))
        return next((forward for forward in found if isinstance(forward, CompiledForward)), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises fxquant's own errors as they are, not wrapped in Dynamo's."""
        if torch.compiler.is_dynamo_compiling():
            return self.plain(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except Exception as error:
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, FxQuantError):
                raise inner from None
            raise

    def report(self) -> ModelReport:
        """What the calls so far showed."""
        return ModelReport.of_model(parameter_facts(self._given[0]), self._backend.reports)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledForward, self._given


def compile_in_place(module: nn.Module, config: QuantConfig | None, running: QuantConfig, **options: Any) -> None:
    """Compile the forward of a module, inside of accelerate's hook if it has one; for the second time: anew.

    config   what is float in the module is quantized as it says; None: stays float.
    running  how graphs are run where there is no config; it names no format.
    options  those of torch.compile.
    """
    slot = _INSIDE_HOOKS if _INSIDE_HOOKS in module.__dict__ else "forward"
    current = module.__dict__.get(slot)
    foreign = current if slot == "forward" and not isinstance(current, CompiledForward) else None
    setattr(module, slot, CompiledForward(module, foreign, config, running, options))


def _names_of(module: weakref.ref[nn.Module]) -> Names:
    living = module()
    return {} if living is None else tensor_names(living)
