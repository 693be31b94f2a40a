"""What stands between a caller and a lowered graph: per call, each parameter is mapped to its packed form.

One graph is called with many parameter sets (equal blocks; a graph break inside a repeated block). A set that wants
other specs gets its own lowering; a set that changed is packed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fxquant.annotation import amend_note, note_of
from fxquant.errors import PathRulesNeedModel
from fxquant.graphs import CapturedGraph, constant_inputs
from fxquant.lowering import Original, Packed
from fxquant.pipeline import Decide, Lowered
from fxquant.products import FROZEN, Kind, bias_of, products, weight_of
from fxquant.report import GraphReport, SiteSqnr
from fxquant.spec import Decision, LinearSpec, QuantConfig
from fxquant.weights import Entry, Stamp, WeightStore

_NOTHING = contextlib.nullcontext()

Names = Mapping[int, tuple[str, ...]]
Measure = Callable[[CapturedGraph, Sequence[Any], Lowered, Sequence[Any]], dict[str, SiteSqnr]]
Lower = Callable[[CapturedGraph, Decide], tuple[Lowered, Callable[..., Any]]]


@dataclass(frozen=True)
class Deciding:
    """Answers what a site gets, from the config.

    ``names`` gives the model's names for its tensors, by identity, as they are now; None if the model is not known.
    """

    config: QuantConfig
    names: Callable[[], Names] | None = None

    def __call__(self, paths: tuple[str, ...], kind: Kind) -> Decision:
        """The decision for a site; of several paths (a shared module) the first one that a rule singles out counts."""
        decisions = [self.config.spec_for(path, kind) for path in paths or ("",)]
        default = self.config.default_for(kind).spec
        return next((d for d in decisions if d.spec != default), decisions[0])


@dataclass(frozen=True)
class Lowering:
    """A lowered graph, its callable, and the model's names for its weights (by attribute name) when it was lowered."""

    lowered: Lowered
    run: Callable[..., Any]
    paths: Mapping[str, str]


class ParameterSet:
    """One set of parameters that a graph is called with: its lowering, and the model's names by attribute name."""

    def __init__(self, lowering: Lowering, names: Mapping[str, str]) -> None:
        self.lowering = lowering
        self.names = names


class BoundSet(ParameterSet):
    """A set whose weights are packed: the packed tensors, and how a call's arguments are put together."""

    def __init__(self, stamp: Stamp, lowering: Lowering, names: Mapping[str, str]) -> None:
        super().__init__(lowering, names)
        self.stamp = stamp
        self.run = lowering.run
        self.generation = -1
        self._arguments = lowering.lowered.binding.arguments
        self._packed: tuple[Tensor, ...] = ()
        slots = [slot for slot, a in enumerate(self._arguments) if isinstance(a, Packed)]
        places = {slot: place for place, slot in enumerate(slots)}
        taken = [
            len(slots) + a.position if isinstance(a, Original) else places[s] for s, a in enumerate(self._arguments)
        ]
        self._take = _taker(taken)  # from the packed tensors and, after them, the original arguments

    def bind(self, store: WeightStore, args: Sequence[Any], *, first: bool) -> None:
        """Look every packed weight up in the store (which packs what is missing or stale)."""
        entries: list[Entry] = []
        for bound in self.lowering.lowered.binding.recipes:
            parameters = [args[p] for p in bound.sources]
            entries.append(store.entry(bound.recipe, parameters, bound.folded if first else None))
        self._packed = tuple(entries[a.recipe].tensors[a.output] for a in self._arguments if isinstance(a, Packed))
        self.generation = store.generation

    def arguments(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The lowered graph's arguments for a call with the original ones."""
        return self._take((*self._packed, *args))


def _below_autograd(run: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Run what is inference: the autograd key of a custom op costs more than a small product.

    So does no_grad, where it has nothing to switch off.
    """
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
        return run(*arguments)


Bound = TypeVar("Bound", bound=ParameterSet)


class Runner(Generic[Bound]):
    """A captured graph with a lowering for each combination of specs that some set of parameters wants.

    ``lower`` turns a captured graph and a decision function into a lowering and a callable. Thread-safe.
    """

    def __init__(self, captured: CapturedGraph, deciding: Deciding, lower: Lower) -> None:
        self._captured = captured
        self._deciding = deciding
        self._lower = lower
        self._sets: dict[bytes, Bound] = {}
        self._lowerings: dict[tuple[LinearSpec | None, ...], Lowering] = {}
        self._lock = threading.RLock()
        self._positions = _site_weight_positions(captured)
        self._take_weights = _taker(self._positions)

    @property
    def reports(self) -> tuple[GraphReport, ...]:
        """One report for each lowering, with the parameter sets that it serves."""
        reports = []
        for lowering in self._lowerings.values():
            sets = [s.names for s in self._sets.values() if s.lowering is lowering]
            others = (names for names in sets if names != lowering.paths)
            further = [{lowering.paths[a]: path for a, path in names.items()} for names in others]
            reports.append(lowering.lowered.report.serving(further))
        return tuple(reports)

    def _remember(self, key: bytes, bound: Bound, weights: tuple[Tensor, ...]) -> Bound:
        """Keep a set as long as its weights live."""
        self._sets[key] = bound
        for weight in weights:
            weakref.finalize(weight, _drop_set, weakref.ref(self), key).atexit = False
        return bound

    def _names_of_set(self, args: Sequence[Any]) -> dict[str, str]:
        """The model's name for each weight of this set, by attribute name."""
        names = self._deciding.names() if self._deciding.names else {}
        own = {w.name: names.get(id(args[w.position]), w.paths) for w in self._captured.weights}
        return {name: paths[0] for name, paths in own.items() if paths}

    def _lowering_for(self, names: Mapping[str, str], lower: Lower | None = None) -> Lowering:
        captured = self._captured.copy()
        if self._lowerings:
            captured = self._renamed(captured, names)
        specs = tuple(self._deciding(note_of(node).paths, form.kind).spec for node, form in products(captured.gm))
        if specs not in self._lowerings:
            self._lowerings[specs] = Lowering(*(lower or self._lower)(captured, self._deciding), names)
        return self._lowerings[specs]

    def _renamed(self, captured: CapturedGraph, names: Mapping[str, str]) -> CapturedGraph:
        """The graph with the module paths of this parameter set; it was captured with another one's."""
        if self._deciding.names is None and self._deciding.config.has_path_rules:
            raise PathRulesNeedModel(self._deciding.config.patterns, "one graph serves several equal modules")
        moves = {_parent(w.paths[0]): _parent(names[w.name]) for w in captured.weights if w.name in names and w.paths}
        for node in captured.gm.graph.nodes:
            if paths := note_of(node).paths:
                amend_note(node, paths=tuple(_moved(path, moves) for path in paths))
        weights = (replace(w, paths=(names[w.name],)) if w.name in names else w for w in captured.weights)
        return replace(captured, weights=tuple(weights))


class GraphRunner(Runner[BoundSet]):
    """A captured graph that can be called with its original arguments, whatever parameters are among them."""

    def __init__(self, captured: CapturedGraph, deciding: Deciding, lower: Lower, store: WeightStore) -> None:
        super().__init__(captured, deciding, lower)
        self._store = store
        self._has_bound = False
        self._measure: Measure | None = None
        self._sqnr: tuple[Lowering | None, dict[str, SiteSqnr]] = (None, {})

    @property
    def reports(self) -> tuple[GraphReport, ...]:
        """One report for each lowering, with the parameter sets that it serves, and errors where they were measured."""
        measured, sqnr = self._sqnr
        pairs = zip(super().reports, self._lowerings.values(), strict=True)
        return tuple(report.with_sqnr(sqnr) if lowering is measured else report for report, lowering in pairs)

    def prepare(self, args: Sequence[Any]) -> None:
        """Lower for the parameters among `args` now, before the first call."""
        self._set_for(args)
        if self._measure is None:
            self._captured.release()

    def measure_first_call(self, measure: Measure) -> None:
        """Have the error of each site measured on the first call's arguments. Until then the captured set is kept."""
        self._measure = measure

    def __call__(self, *args: Any) -> Any:
        return self._run(self._set_for(args), args)

    def frozen(self, inputs: Sequence[Any], held: tuple[Tensor, ...]) -> Callable[..., Any]:
        """The graph on the weights that are among `held` as they are now; called with `inputs` only.

        No call looks at the weights again. The callable, and nothing else here, keeps them alive.
        """
        bound = self._set_for((*inputs, *held))
        holes = [object() for _ in inputs]
        arguments: list[Any] = list(bound.arguments((*holes, *held)))
        slots = [(slot, i) for slot, a in enumerate(arguments) for i, hole in enumerate(holes) if a is hole]

        def run(*args: Any) -> Any:
            if self._measure is not None:
                self._measure_once(bound, (*args, *held))
            filled = arguments.copy()
            for slot, position in slots:
                filled[slot] = args[position]
            return _below_autograd(bound.run, filled)

        return run

    def _run(self, bound: BoundSet, args: Sequence[Any]) -> Any:
        if self._measure is not None:
            self._measure_once(bound, args)
        return _below_autograd(bound.run, bound.arguments(args))

    def _measure_once(self, bound: BoundSet, args: Sequence[Any]) -> None:
        measure, self._measure = self._measure, None
        if measure is not None:
            captured_args = [args[p] for p in self._captured.inputs]
            sqnr = measure(self._captured, captured_args, bound.lowering.lowered, bound.arguments(args))
            self._sqnr = bound.lowering, sqnr
            self._captured.release()

    def _set_for(self, args: Sequence[Any]) -> BoundSet:
        weights = self._take_weights(args)
        bound = self._sets.get(_identities(weights))
        if bound is not None and bound.generation == self._store.generation and bound.stamp.is_fresh(weights):
            return bound
        with self._lock:
            return self._bind(weights, args)

    def _bind(self, weights: tuple[Tensor, ...], args: Sequence[Any]) -> BoundSet:
        key = _identities(weights)
        bound = self._sets.get(key)
        stamp = Stamp(weights)  # before packing: a change while it packs is seen at the next call
        if bound is None:
            names = self._names_of_set(args)
            bound = self._remember(key, BoundSet(stamp, self._lowering_for(names), names), weights)
        bound.bind(self._store, args, first=not self._has_bound)
        bound.stamp = stamp  # after packing: until then another thread, or a call after an error, finds it stale
        self._has_bound = True
        return bound


class TrainingRunner(Runner[ParameterSet]):
    """A captured graph for training: parameters are arguments like any other, and autograd sees every call.

    ``lower`` gives callables that take the original arguments.
    """

    def prepare(self, args: Sequence[Any], first: Lower | None = None) -> None:
        """Lower for the parameters among `args` now, before the first call; by `first`, if it is given."""
        self._set_for(args, first)
        self._captured.release()

    def __call__(self, *args: Any) -> Any:
        return self._set_for(args).lowering.run(*args)

    def _set_for(self, args: Sequence[Any], lower: Lower | None = None) -> ParameterSet:
        weights = self._take_weights(args)
        bound = self._sets.get(key := _identities(weights))
        if bound is None:
            with self._lock:
                names = self._names_of_set(args)
                bound = self._remember(key, ParameterSet(self._lowering_for(names, lower), names), weights)
        return bound


def _taker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that picks these positions of a sequence, as a tuple."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)  # of a single position it would give no tuple
    return lambda values: tuple(values[p] for p in positions)


def _identities(objects: tuple[Any, ...]) -> bytes:
    """What tells these very objects from others: the pointers that a tuple consists of, as they lie in memory.

    The same as all of their ``id``. But that makes a Python number of each, which costs much more, at every call.
    """
    return ctypes.string_at(id(objects) + tuple.__basicsize__, len(objects) * ctypes.sizeof(ctypes.c_void_p))


def _drop_set(runner: weakref.ref[Runner[Any]], key: bytes) -> None:
    if (living := runner()) is not None:
        living._sets.pop(key, None)


def _site_weight_positions(captured: CapturedGraph) -> list[int]:
    """Positions of the parameters that products are computed from: biases too, since joined biases are folded.

    And of the tensors that frozen modules give to their kernels: by these a report tells equal modules apart.
    """
    operands = [n for site, _ in products(captured.gm) for n in (weight_of(site), bias_of(site)) if n is not None]
    frozen = [n for n in captured.gm.graph.nodes if note_of(n).reason == FROZEN]
    held = [n for site in frozen for n in site.all_input_nodes if n.op == "get_attr"]
    names = {str(n.target) for n in constant_inputs([*operands, *held])}
    return [w.position for w in captured.weights if w.name in names]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _moved(path: str, moves: Mapping[str, str]) -> str:
    for old, new in moves.items():
        if path == old or path.startswith(old + "."):
            return new + path[len(old) :]
    return path
