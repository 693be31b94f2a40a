"""Calibration: watch the activations of a quantized model, then set their static scales."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.calibration.ranges import OBSERVERS
from fxquant.calibration.roots import outermost_module, paths_in, unused
from fxquant.calibration.stats import CalibrationStats, Choice, Entry, ModuleStats, TensorStats, scale_of
from fxquant.errors import CalibrationOpen, InvalidOption, NonFiniteActivation, UncalibratedModules
from fxquant.nn import recording
from fxquant.nn.base import QModule

logger = logging.getLogger("fxquant")
_OPENING = threading.Lock()  # of the list of recorders and the compiler's stance, which belong to the process


class Calibration:
    """``with Calibration() as c:`` run data through the model; the scales are set when the block ends.

    Every quantized module that is called within, and whose activations can be calibrated, gets ``input_scale`` and
    ``output_scale`` (float32, 0-d: the range that the observer chose, over the format's largest code). From then on its
    activations are quantized statically, per tensor. Within the block activations stay float and compiled models run in
    eager. Each calibration starts afresh and replaces what an earlier one set; of nested ones each sees everything, and
    the one that ends last has the last word. A block that is left by an exception sets nothing.

    model       whose modules are calibrated, and missed if no data reaches them. Left out: every model that is called
                in the block, each from its outermost module on.
    momentum    of the moving average of absmax: 0 keeps the last batch only, 0.9 a tenth of it.
    observer    absmax: the moving average of each batch's largest absolute value. minmax: the largest of all batches.
                percentile: what `percentile` % of all absolute values do not exceed. mse: where rounding and clipping
                leave the least squared error. docs/calibration.md says when to use which.
    debug       log a line for each module, level INFO, logger "fxquant".

    Recording belongs to the process: calls from other threads are recorded too, one at a time.

    Raises:
        InvalidOption: an argument has a value that it cannot have.
        NonFiniteActivation (in the block): a module met NaN or infinity.
        CalibrationOpen: the same object is entered again before it was left.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        momentum: float = 0.9,
        observer: str = "absmax",
        percentile: float = 99.9,
        debug: bool = False,
    ) -> None:
        _check(model, momentum, observer, percentile)
        self._model = model
        self._momentum = float(momentum)
        self._choice = Choice(observer, float(percentile))
        self._debug = debug
        self._is_open = False
        self._recording = threading.Lock()
        self._stance: Any = None
        self._begin()

    def _begin(self) -> None:
        self._entries: dict[QModule, Entry] = {}
        self._models: dict[nn.Module, None] = {} if self._model is None else {self._model: None}
        self._stats: CalibrationStats | None = None

    # ---- the block

    def __enter__(self) -> Calibration:
        with _OPENING:
            if self._is_open:
                raise CalibrationOpen()
            self._begin()
            if not any(isinstance(recorder, Calibration) for recorder in recording.ACTIVE):
                # Set by the constructor. A compiled graph would not tell what passes through it.
                self._stance = torch.compiler.set_stance("force_eager")
            recording.ACTIVE.append(self)
            self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        named, missed = self._named()
        for module, entry in named.values():
            entry.written = kind is None and entry.is_reached and module.calibratable
        self._stats = CalibrationStats(named, self._choice)
        self._entries, self._models = {}, {}
        if kind is None:
            self._finish(self._stats, [module for module, entry in named.values() if entry.written], missed)

    def _close(self) -> None:
        with _OPENING:
            recording.ACTIVE.remove(self)
            self._is_open = False
            stance, self._stance = self._stance, None
            others = [recorder for recorder in recording.ACTIVE if isinstance(recorder, Calibration)]
            if stance is not None and others:
                others[0]._stance = stance  # blocks may overlap: the last to end gives back what was before the first
            elif stance is not None:
                stance.__exit__(None, None, None)

    def _finish(self, stats: CalibrationStats, modules: Sequence[QModule], missed: Sequence[str]) -> None:
        found = [(module, stats[module]) for module in modules]  # all of them, before the first is set
        for module, seen in found:
            module.input_scale = _scale(seen.input, module)
            module.output_scale = _scale(seen.output, module)
            module.stop_waiting(seen.path)
        if self._debug:
            for seen in stats.values():
                logger.info("calibrated %s (%s): %s", seen.path, seen.format, _words(seen))
        if missed or not found:
            warnings.warn(UncalibratedModules(missed), stacklevel=3)

    # ---- what modules tell (the protocol of `nn.recording`)

    def record_call(self, module: nn.Module) -> None:
        assert isinstance(module, QModule)
        outermost = outermost_module() if self._model is None else None
        with self._recording:
            if outermost is not None:
                self._models.setdefault(outermost)
            if (entry := self._entry(module)) is not None:
                entry.calls += 1

    def record_input(self, module: nn.Module, x: Tensor) -> None:
        """x: any shape; left out if it is not a float tensor, the indices of an embedding, say."""
        self._record(module, x, "input")

    def record_output(self, module: nn.Module, y: Tensor) -> None:
        self._record(module, y, "output")

    def _record(self, module: nn.Module, x: Tensor, side: str) -> None:
        assert isinstance(module, QModule)
        with self._recording:
            entry = self._entry(module)
            if entry is None or not x.is_floating_point():
                return
            seen = entry.input if side == "input" else entry.output
            if seen.add(x):
                return
        path = paths_in(self._models).get(module, type(module).__name__)
        raise NonFiniteActivation(path, side, int(x.numel() - x.isfinite().sum()), x.numel())

    def _entry(self, module: QModule) -> Entry | None:
        """What is kept of the module; None if its activations are float."""
        activations = module.quantization.activations
        if activations is None:
            return None
        return self._entries.setdefault(module, Entry(activations.format, self._momentum))

    # ---- what was seen

    @property
    def stats(self) -> CalibrationStats:
        """What was seen, by path or by module: so far within the block, in the last one after it."""
        return CalibrationStats(self._named()[0], self._choice) if self._stats is None else self._stats

    def plot(self, path: str | Path, include: str | Sequence[str] | None = None) -> None:
        """Draw what was seen: a histogram of inputs and one of outputs for each module, with its range.

        path: a file .png, .svg or .pdf; it is there as a whole or not at all. include: globs of module paths, as
        `quantize` takes them; all modules if left out. Needs matplotlib.

        Raises:
            PackageMissing: matplotlib is not installed.
            NothingRecorded: no module has been seen yet.
            PatternMatchesNothing, InvalidOption (of path).
        """
        from fxquant.calibration.plot import draw

        draw(self.stats, Path(path), include)

    def __str__(self) -> str:
        more = {"absmax": f", momentum={self._momentum:g}", "percentile": f", percentile={self._choice.percentile:g}"}
        return f"Calibration(observer={self._choice.observer!r}{more.get(self._choice.observer, '')})\n{self.stats}"

    def _named(self) -> tuple[dict[str, tuple[QModule, Entry]], list[str]]:
        """By path, what was seen of each module; and the paths of those that could be calibrated and were not reached.

        A module that is in none of the models goes by its class; with a model given it is left out.
        """
        paths = paths_in(self._models)
        named: dict[str, tuple[QModule, Entry]] = {}
        for module, entry in self._entries.items():
            if module in paths or self._model is None:
                named[paths.get(module) or unused(type(module).__name__, named)] = module, entry
        reached = {module for module, entry in named.values() if entry.is_reached}
        return named, [
            path
            for module, path in paths.items()
            if module not in reached and module.calibratable and module.quantization.activations is not None
        ]


def _scale(side: TensorStats | None, module: QModule) -> Tensor | None:
    if side is None:
        return None
    activations = module.quantization.activations
    assert activations is not None
    return scale_of(side.range, activations.format).to(side.device)


def _words(seen: ModuleStats) -> str:
    sides = {"input": seen.input, "output": seen.output}
    return ", ".join(
        f"{name} {side.min:.4g} to {side.max:.4g}, range {side.range:.4g}, scale {side.scale:.4g}"
        for name, side in sides.items()
        if side is not None
    )


def _check(model: object, momentum: object, observer: object, percentile: object) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise InvalidOption("model", model, "it takes an nn.Module; momentum and the rest are given by name")
    if not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        raise InvalidOption("momentum", momentum, "it takes a number from 0 to below 1")
    if observer not in OBSERVERS:
        raise InvalidOption("observer", observer, f"it takes {', '.join(OBSERVERS)}")
    if not isinstance(percentile, int | float) or not 0 < percentile <= 100:
        raise InvalidOption("percentile", percentile, "it takes a number above 0, up to 100")
