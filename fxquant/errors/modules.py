"""Models and modules that cannot be quantized, changed or trained in the way that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.errors.base import FxQuantError
from fxquant.errors.words import listed, sentence


class NotAModule(FxQuantError, TypeError):
    """Something other than an nn.Module where a model is needed."""

    def __init__(self, met: object) -> None:
        super().__init__(
            f"a model is needed, an nn.Module, but this is {getattr(met, '__name__', met)!r}, a {type(met).__name__}. "
            "For a function there is torch.compile(f, backend='fxquant', options={...})."
        )


class NotAQuantizedClass(FxQuantError, TypeError):
    """A class given to `register_module` that cannot stand in for the class it was registered for."""

    def __init__(self, kind: object, base: type) -> None:
        super().__init__(
            f"{getattr(kind, '__name__', kind)!r} cannot be the quantized class of {base.__name__}: "
            f"write it as class Q{base.__name__}(fxquant.QModule, {base.__name__})."
        )


class IncompleteModuleKind(FxQuantError, NotImplementedError):
    """A quantized class that lacks a method which its kind needs."""

    def __init__(self, cls: str, method: str, purpose: str) -> None:
        super().__init__(
            f"{cls} has no method {method!r}, which {purpose}. Define it in the class that register_module was given "
            f"(see fxquant.nn.QModule), or let has_kernels() say False if it is kernel_product."
        )


class AlreadyFrozen(FxQuantError, RuntimeError):
    """Modules whose weights are codes already, asked to become other codes; `paths` names them."""

    def __init__(self, paths: Sequence[str], met: object, wanted: object) -> None:
        self.paths = tuple(paths)
        super().__init__(
            f"{listed(paths)}: frozen as {met}, asked to become {wanted}. Their float weights are gone: "
            "quantize the float model anew, or leave these modules out with exclude=."
        )


class FrozenWeight(FxQuantError, AttributeError):
    """A frozen weight that somebody would replace or train."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(
            f"{module}.{name} is frozen: it is a dequantized copy of codes, and what is written to it would be lost. "
            "Change the float model before freeze, or load codes with load_state_dict."
        )


class MergeRefused(FxQuantError, RuntimeError):
    """An adapter that cannot be merged into a quantized weight."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module}: {sentence(reason)} Nothing has been merged; the adapter works unmerged.")


class NothingQuantized(FxQuantError, ValueError):
    """A float model where a quantized one is needed."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: no module of this model is quantized. Call fxquant.quantize(model, ...) first, and freeze; "
            "what fxquant.compile quantizes is in the compiled graph, not in the model."
        )
