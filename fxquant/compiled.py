"""fxquant.compile, explain and tune: the compile door for those who have the model in hand."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from fxquant.backend import FreezingBackend, FrozenGraphs, QuantizingBackend
from fxquant.errors import FxQuantError, InvalidOption, NotAModule, PatternMatchesNothing
from fxquant.fallback import InStep, Shadow, tensor_names
from fxquant.gradients import InferenceOnly
from fxquant.lowering.tuned import HEARD, Heard
from fxquant.nn.base import QModule
from fxquant.ops.gpu import forget_plans
from fxquant.report import ModelReport, parameter_facts
from fxquant.runner import Names
from fxquant.spec import QuantConfig
from fxquant.target import Problem, Target
from fxquant.tuning import TuneReport, Watch, tune_problems, unwatched
from fxquant.weights import process_store


class TensorsInstalled:
    """While it is entered, Dynamo makes a module's tensors part of the graph. `config.patch` takes 30 us longer."""

    def __enter__(self) -> None:
        self._before = torch._dynamo.config.install_free_tensors
        torch._dynamo.config.install_free_tensors = True

    def __exit__(self, *_: object) -> None:
        torch._dynamo.config.install_free_tensors = self._before


def beside_the_model(guards: Sequence[Any]) -> list[bool]:
    """Which guards of Dynamo's a frozen model keeps: those on inputs and torch's state, not on modules and globals."""
    return [not (guard.is_global or guard.orig_guard.source.is_unspecialized_nn_module()) for guard in guards]


ConfigLike = QuantConfig | str | Mapping[str, Any] | None


class CompiledModel(nn.Module):
    """A quantized, compiled view of a model; the model itself stays as it was, and stays the owner of its weights.

    Call it like the model. Attributes that are not its own are the model's, to read and to set. A copy or a pickle has
    a model of its own, and is compiled anew. Inside another torch.compile, the model is compiled by that one's backend,
    as it is with torch.compile's own. Made by `fxquant.compile`.
    """

    def __init__(
        self, model: nn.Module, config: QuantConfig, freezing: bool = False, **torch_compile_kwargs: Any
    ) -> None:
        super().__init__()
        self._orig_mod = model
        self.__dict__["_recipe"] = partial(CompiledModel, config=config, freezing=freezing, **torch_compile_kwargs)
        self.__dict__["_given"] = config, freezing, torch_compile_kwargs
        self._start(config, freezing, torch_compile_kwargs)

    def _start(self, config: QuantConfig, freezing: bool, torch_compile_kwargs: Mapping[str, Any]) -> None:
        model = self._orig_mod
        # Dynamo keeps the backend as long as the code of the model's class lives: it must not keep the model.
        names = partial(_names_of, weakref.ref(model))
        leave_float = partial(_has_quantized_modules, weakref.ref(model))
        watch = InferenceOnly()
        shadow = Shadow(model, config, process_store(), watch, leave_float)
        self.__dict__.update(_class=type(model), _shadow=shadow, _graphs=FrozenGraphs())
        if freezing:
            self.__dict__["_backend"] = FreezingBackend(self._graphs, config, names, watch, leave_float)
            self.__dict__["_around_a_call"] = TensorsInstalled
            options = {"guard_filter_fn": beside_the_model}
            torch_compile_kwargs = {**torch_compile_kwargs, "fullgraph": True, "options": options}
        else:
            self.__dict__["_backend"] = QuantizingBackend(config, names, watch, leave_float)
            self.__dict__["_around_a_call"] = partial(InStep, shadow)
        self.__dict__["_compiled"] = torch.compile(  # pyright: ignore[reportCallIssue]  (it wants a plain function)
            self._shadow.root,
            backend=self._backend,
            isolate_recompiles=True,
            **torch_compile_kwargs,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, quantized. Raises fxquant's own errors as they are, not wrapped in Dynamo's."""
        if torch.compiler.is_dynamo_compiling():
            return self._orig_mod(*args, **kwargs)
        if type(self._orig_mod) is not self._class:  # `quantize` gives modules other classes, also the root
            self._start(*self._given)
        with self._around_a_call():
            try:
                return self._compiled(*args, **kwargs)
            except Exception as error:
                inner = getattr(error, "inner_exception", None)  # of Dynamo's BackendCompilerFailed
                if isinstance(inner, FxQuantError):
                    raise inner from None
                raise

    @property
    def training(self) -> bool:
        """The model's mode; ``train`` and ``eval`` set it."""
        return self._orig_mod.training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if "_modules" in self.__dict__:  # nn.Module sets a default before there are any
            self._orig_mod.training = mode

    def report(self) -> ModelReport:
        """What was quantized, how, and what was not and why. It covers the calls made so far."""
        graphs = self._backend.reports
        seen = {name for graph in graphs for name in graph.fates()}
        return ModelReport.of_model(parameter_facts(self._orig_mod), graphs, self._shadow.fallbacks(seen))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["_orig_mod"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self._orig_mod, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self._orig_mod, name)

    def _is_own(self, name: str) -> bool:
        return name == "_orig_mod" or name in self.__dict__ or hasattr(CompiledModel, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._recipe, (self._orig_mod,)


def compile(
    model: nn.Module,
    config: ConfigLike = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    freezing: bool = False,
    **fields: Any,
) -> CompiledModel:
    """torch.compile with quantization, for a model in hand.

    `config` is a `QuantConfig`, the name of a preset, or a mapping of options; `fields` are options too, over those.
    `fullgraph`, `dynamic` and `mode` are torch.compile's. The model is not changed. Unlike ``backend="fxquant"`` this
    door resolves rules by module path everywhere, quantizes what Dynamo never sees (it runs in eager, on the same ops)
    and reports on the whole model.

    `freezing` is for inference of a model that nobody changes after its first call: weights, buffers, attributes and
    modes, and the globals that its code reads, are taken as they are then, and no call looks at them again. The inputs
    and torch's state (autocast, gradients) are checked as ever. The model has to be one graph, and all that it reads to
    stay where it is.

    Raises:
        NotAModule: `model` is a function, say.
        UnknownOption, InvalidOption, UnknownPreset, …: the config does not make sense.
        PatternMatchesNothing: a glob of the config matches no module of the model.
    """
    resolved = resolve_config(config, {**fields, **({} if mode is None else {"mode": mode})})
    _check(model, resolved)
    if freezing and resolved.training:
        raise InvalidOption("freezing", True, "training changes the weights; leave one of the two out")
    return CompiledModel(model, resolved, freezing, fullgraph=fullgraph, dynamic=dynamic)


def explain(
    model: nn.Module, *args: Any, config: ConfigLike = None, kwargs: Mapping[str, Any] | None = None, **fields: Any
) -> ModelReport:
    """What `compile` would do with the model on these inputs, as data; ``str()`` of it is a summary.

    Runs the model once, in eager and without gradients; compiles nothing.
    """
    resolved = resolve_config(config, {**fields, "executor": "eager"})
    _check(model, resolved)
    view = CompiledModel(model, resolved)
    with torch.no_grad():
        view(*args, **(kwargs or {}))
    return replace(view.report(), door="explain")


def refresh(model: nn.Module) -> int:
    """Forget every packed form of the model's weights: they are packed again at the next call.

    For edits that no cheap check sees: of a few elements, through ``.data`` or numpy. Returns how many were dropped.
    """
    return process_store().forget([*model.parameters(), *model.buffers()])


def tune(
    what: nn.Module | Iterable[Problem],
    *args: Any,
    config: ConfigLike = None,
    kwargs: Mapping[str, Any] | None = None,
    target: Target | str | None = None,
    mode: Literal["quick", "full"] = "quick",
    progress: Watch = unwatched,
    **fields: Any,
) -> TuneReport:
    """Find the fastest configuration of each kernel, for a model on these inputs or for given problems, and keep it.

    Compiled graphs and the ops use what is kept, in this process and in later ones. A problem that was tuned before on
    this device, with these versions and this source of the kernel, costs nothing. A model is quantized as `compile`
    does with `config` and `fields`, and run once in eager. `target`: the CPU, unless the model is on a GPU; the name of
    an architecture, 'sm90': without such a GPU here the model of time chooses, and nothing is measured. `progress` is
    called before and after each problem.

    Raises:
        NothingToTune: no kernels for the target, or none that answers to what was asked.
        NoRightAnswer: every configuration of some problem disagrees with the reference.
        InvalidOption: no such target or mode; and what `compile` raises.
    """
    if mode not in ("quick", "full"):
        raise InvalidOption("mode", mode, "it takes 'quick' or 'full'")
    if not isinstance(what, nn.Module):
        return _tuned(what, target or Target.of_this_machine(), mode, progress)
    resolved = resolve_config(config, {**fields, "executor": "eager", "autotune": "none"})
    _check(what, resolved)
    first = next(what.parameters(), None)
    here = Target.of_this_machine("cpu" if first is None else first.device)
    name = target.arch or target.device if isinstance(target, Target) else target
    heard = Heard(of_sites=name not in (None, here.arch or here.device))
    token = HEARD.set(heard)
    try:
        with torch.no_grad():
            CompiledModel(what, resolved)(*args, **(kwargs or {}))
    finally:
        HEARD.reset(token)
    return _tuned(heard.problems, target or here, mode, progress)


def _tuned(
    problems: Iterable[Problem], target: Target | str, mode: Literal["quick", "full"], progress: Watch
) -> TuneReport:
    try:
        return tune_problems(list(problems), target, mode, progress)
    finally:
        forget_plans()  # of an interrupted run too: what was found by then is kept


def resolve_config(config: ConfigLike, fields: Mapping[str, Any]) -> QuantConfig:
    """The config from a `QuantConfig`, a preset's name or a mapping, with single fields replaced."""
    if isinstance(config, QuantConfig):
        return config.with_fields(**fields) if fields else config
    base: Mapping[str, Any] = {"preset": config} if isinstance(config, str) else config or {}
    return QuantConfig.from_options({**base, **fields})


def _names_of(model: weakref.ref[nn.Module]) -> Names:
    living = model()
    return {} if living is None else tensor_names(living)


def _has_quantized_modules(model: weakref.ref[nn.Module]) -> bool:
    living = model()
    return living is not None and any(isinstance(module, QModule) for module in living.modules())


def _check(model: nn.Module, config: QuantConfig) -> None:
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    if dead := config.unmatched(paths):
        raise PatternMatchesNothing(dead, paths)
