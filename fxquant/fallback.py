"""What Dynamo never shows us, quantized all the same.

`fxquant.compile` runs a shadow of the user's model: each linear, convolution and embedding has a twin that shares its
``__dict__`` and asks where it runs. Under Dynamo it is the plain float product, which the backend quantizes in the
graph; in eager (a disabled module, a frame that Dynamo gave up) it is the same quantized op, from the very first call.
Modules with such products below them have a twin whose children are twins; all others are the user's own. The user's
modules are never touched. What `fxquant.quantize` has changed is quantized wherever it runs, and has no twin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from itertools import chain
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.eager import PRODUCT_MODULES, EagerProduct, join, product_module
from fxquant.gradients import InferenceOnly
from fxquant.nn.base import QModule
from fxquant.products import FROZEN
from fxquant.report import Site, quantized_weights
from fxquant.spec import QuantConfig
from fxquant.weights import WeightStore


class ShadowProduct(nn.Module):
    """A product module of the shadow tree: the plain product for Dynamo, the quantized op in eager.

    Its ``__dict__`` is that of the user's module; what is its own are slots.
    """

    __slots__ = ("_fxquant_eager", "_fxquant_reason")

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():  # is_compiling() is also true while another thread compiles
            return super().forward(input)
        if not self._fxquant_reason:
            self._fxquant_reason = _why_in_eager()
        return self._fxquant_eager(self, input)


class ShadowLinear(ShadowProduct, nn.Linear):
    __slots__ = ()


class ShadowConv1d(ShadowProduct, nn.Conv1d):
    __slots__ = ()


class ShadowConv2d(ShadowProduct, nn.Conv2d):
    __slots__ = ()


class ShadowConv3d(ShadowProduct, nn.Conv3d):
    __slots__ = ()


class ShadowEmbedding(ShadowProduct, nn.Embedding):
    __slots__ = ()


# Made once: Dynamo guards on the class. Subclasses of the user's get a shadow class of their own.
_SHADOWS: dict[type, type] = {
    nn.Linear: ShadowLinear,
    nn.Conv1d: ShadowConv1d,
    nn.Conv2d: ShadowConv2d,
    nn.Conv3d: ShadowConv3d,
    nn.Embedding: ShadowEmbedding,
}
_BASES = tuple(known.base for known in PRODUCT_MODULES)


def _why_in_eager() -> str:
    """Reads the call stack: the user's line that led here, and whether a torch.compiler.disable stands above it."""
    place, disabled = "", False
    of_torch = str(Path(torch.__file__).parent)
    frame = sys._getframe(2)
    while frame is not None and not disabled:
        file = frame.f_code.co_filename
        if not place and not file.startswith(of_torch) and file != __file__:
            place = f"{Path(file).name}:{frame.f_lineno}"
        # 3.11 names the class of a function; in 3.10 the reason stays the general one.
        disabled = file.endswith("eval_frame.py") and "DisableContext" in getattr(frame.f_code, "co_qualname", "")
        frame = frame.f_back
    why = "torch.compiler.disable" if disabled else "a frame that Dynamo did not trace (graph break or skipped code)"
    return f"never seen by Dynamo: {why} at {place}"


_OWN = frozenset({"_modules", "_is_torch_compile"})  # the children; torch.compile's mark on what it compiles


_RAN = {"training": "ran in eager on rounded operands"}


def _row_of_quantized(module: QModule, path: str, names: dict[str, int]) -> Site:
    frozen = FROZEN if module.is_frozen else "quantized by the model door"
    held = sum(t.nbytes for name in module._forms for t in module.parts(name) if t is not None)
    return Site(
        (path,),
        "fallback",
        spec_text=str(module.quantization),
        reason=f"never seen by Dynamo: {frozen}, runs so in eager",
        parameter_names=tuple(names),
        bytes_before=sum(names.values()),
        bytes_after=held or sum(names.values()),
        op=module.kind,
    )


class _Fields:
    """The plain attributes of many modules (``training``, a flag, a cache), looked at in one go at every call."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        shared = nn.Module().__dict__.keys() - {"training"}  # dictionaries that both sides hold; and the children
        self._dicts = [m.__dict__ for m in modules]
        both = [(fields, name) for fields in self._dicts for name in fields if name not in shared]
        self._owners, self._names = [fields for fields, _ in both], [name for _, name in both]
        self._sizes, self._values = self._read()

    def have_changed(self) -> bool:
        sizes, values = self._read()
        return sizes != self._sizes or not all(map(is_, values, self._values))

    def _read(self) -> tuple[list[int], list[Any]]:
        return list(map(len, self._dicts)), list(map(dict.get, self._owners, self._names))


def _carry_over(sources: Sequence[nn.Module], targets: Sequence[nn.Module]) -> None:
    for source, target in zip(sources, targets, strict=True):
        ours, theirs = source.__dict__, target.__dict__
        theirs.update({name: value for name, value in ours.items() if name not in _OWN})
        for name in theirs.keys() - ours.keys() - _OWN:
            del theirs[name]


class Shadow:
    """The shadow of a model, kept in step with it: call ``pull`` before and ``push`` after each run of ``root``."""

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig,
        store: WeightStore,
        watch: InferenceOnly | None = None,
        leave_float: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model = model
        self._config = config
        self._store = store
        self._watch = watch or InferenceOnly()
        self._leave_float = leave_float
        self._twins: dict[int, tuple[nn.Module, nn.Module]] = {}  # by the original's id, which the original keeps alive
        self._shadow_kinds = dict(_SHADOWS)
        self._mirror()

    @property
    def root(self) -> nn.Module:
        """The module to compile; it stays the same one."""
        return self._twins[id(self._model)][1]

    def pull(self) -> None:
        """Take over what the user changed on the model: modules replaced, ``training`` and other plain attributes."""
        if self._user_fields.have_changed():
            _carry_over(self._originals, self._copies)
            self._look_at_fields()
        if self._read_children() != self._known_children:
            self._mirror()

    def push(self) -> None:
        """Give the model the plain attributes that its code set while it ran."""
        if self._own_fields.have_changed():
            _carry_over(self._copies, self._originals)
            self._look_at_fields()

    def _look_at_fields(self) -> None:
        self._user_fields, self._own_fields = _Fields(self._originals), _Fields(self._copies)

    def _read_children(self) -> tuple[list[int], list[Any], list[type]]:
        """The children, and the classes of products: `fxquant.quantize` gives a module another one."""
        children = list(chain.from_iterable(map(dict.values, self._children)))
        return list(map(len, self._children)), children, list(map(type, self._products))

    def fallbacks(self, seen: Set[str]) -> list[Site]:
        """The report's rows for the products that ran in eager; `seen` are the parameters that graphs report on.

        A quantized module, and one with a forward of its own, which is left alone, has a row if no graph has seen it.
        """
        rows = []
        for path, module in self._model.named_modules():
            _, twin = self._twins.get(id(module), (module, module))
            if isinstance(module, QModule):
                names = quantized_weights(module, path)
                if names and seen.isdisjoint(names):
                    rows.append(_row_of_quantized(module, path, names))
            elif isinstance(twin, ShadowProduct):
                if site := twin._fxquant_eager.site:
                    status = "fallback" if site.is_quantized else site.status
                    ran = _RAN.get(site.status, "ran in eager on the quantized op") if site.is_quantized else ""
                    words = (twin._fxquant_reason, ran, site.reason)
                    rows.append(replace(site, status=status, reason="; ".join(filter(None, words)), source=""))
            elif isinstance(module, _BASES):
                # A parametrized weight has other parameters.
                weights = tuple(join(path, name) for name, p in module.named_parameters() if p.dim() >= 2)
                if weights and seen.isdisjoint(weights):
                    own = f"{type(module).__name__} has a forward of its own, which is left as it is"
                    reason = f"never seen by Dynamo: {own}"
                    rows.append(Site((path,), "declined", reason=reason, parameter_names=weights))
        return rows

    def _mirror(self) -> None:
        """Make the twins' children those of the originals; a module that was there before keeps its twin."""
        paths: dict[int, tuple[str, ...]] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            paths[id(module)] = (*paths.get(id(module), ()), path)
        twins = ((m, self._twin_of(m, paths[id(m)])) for m in self._model.modules())
        self._twins = {id(m): (m, twin) for m, twin in twins if twin is not None}  # an empty Sequential is false
        containers = [(m, twin) for m, twin in self._twins.values() if not isinstance(twin, ShadowProduct)]
        self._products = [m for m, twin in self._twins.values() if isinstance(twin, ShadowProduct)]
        self._originals, self._copies = [m for m, _ in containers], [twin for _, twin in containers]
        self._children = [m._modules for m in self._originals]
        self._known_children = self._read_children()
        for module, twin in containers:
            children = ((name, child, self._twins.get(id(child))) for name, child in module._modules.items())
            twin.__dict__["_modules"] = {name: both[1] if both else child for name, child, both in children}
        self._look_at_fields()

    def _twin_of(self, module: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
        """The module's twin, made if it has none yet; None for one with no products below it, or quantized itself."""
        known = self._twins.get(id(module))
        if known and isinstance(known[1], type(module)):
            return known[1]
        if kind := product_module(module):
            twin = object.__new__(self._shadow_kind(type(module)))
            twin.__dict__ = module.__dict__
            twin._fxquant_reason = ""
            twin._fxquant_eager = EagerProduct(kind, paths, self._config, self._store, self._watch, self._leave_float)
            return twin
        scripted = isinstance(module, torch.jit.ScriptModule)  # compiled by TorchScript: nothing of it can be seen
        own = scripted or isinstance(module, QModule) or not any(map(product_module, module.modules()))
        if own and module is not self._model:
            return None
        twin: Any = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        return twin

    def _shadow_kind(self, kind: type) -> Any:
        if kind not in self._shadow_kinds:
            self._shadow_kinds[kind] = type(f"Shadow{kind.__name__}", (ShadowProduct, kind), {"__slots__": ()})
        return self._shadow_kinds[kind]


def tensor_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """The model's names for its parameters and buffers, by identity; a tied tensor has several."""
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in _all_tensors(model):
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    return names


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class InStep:
    """Around a run of the shadow: it takes over the model's changes before, and gives its own back after."""

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    def __enter__(self) -> None:
        self._shadow.pull()

    def __exit__(self, *_: object) -> None:
        self._shadow.push()
