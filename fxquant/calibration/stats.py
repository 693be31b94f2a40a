"""What a calibration saw, by module."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxquant.calibration.observers import Seen
from fxquant.calibration.ranges import chosen_range
from fxquant.spec import NumberFormat

SHOWN = 40  # rows of a table
HEADINGS = ("module", "format", "calls", "input", "range", "scale", "output", "range", "scale")


@dataclass(frozen=True)
class TensorStats:
    """The inputs of one module, or its outputs.

    batches   how many there were; empty ones are left out
    min, max  of all values; `absmax` is the larger of the two, without sign
    range     what the scale covers: values from -range to range, others saturate
    scale     range / the format's largest code, in float32
    device    where the last batch was, and the scale of a module is
    counts    int64 [4096]: how many values in each bin
    edges     float64 [4097]: the bounds of the bins
    """

    batches: int
    min: float
    max: float
    absmax: float
    range: float
    scale: float
    device: torch.device
    counts: Tensor = field(repr=False)
    edges: Tensor = field(repr=False)


@dataclass(frozen=True)
class ModuleStats:
    """One module: how often it was called, the format of its activations, and both sides; None is one without values.

    written: the calibration has set its scales. It hasn't if it still runs, was left by an exception, or if the
    module's activations are quantized by token or group whatever their range.
    """

    path: str
    format: str
    calls: int
    input: TensorStats | None
    output: TensorStats | None
    written: bool


@dataclass(frozen=True)
class Choice:
    """How a range is chosen from what was seen."""

    observer: str
    percentile: float

    def range_of(self, seen: Seen, number: NumberFormat) -> float:
        return chosen_range(self.observer, seen, number, self.percentile)


class Entry:
    """What is kept of one module while it is observed."""

    def __init__(self, number: NumberFormat, momentum: float) -> None:
        self.number = number
        self.calls = 0
        self.input = Seen(momentum)
        self.output = Seen(momentum)
        self.written = False

    @property
    def is_reached(self) -> bool:
        """True if there was a value to take a range from."""
        return bool(self.input.batches or self.output.batches)


class CalibrationStats(Mapping[str, ModuleStats]):
    """`ModuleStats` by path, in the order of the first calls; a module is a key too. ``str()`` of it is a table."""

    def __init__(self, entries: Mapping[str, tuple[nn.Module, Entry]], choice: Choice) -> None:
        self._entries = {path: entry for path, (_, entry) in entries.items()}
        # A calibration that is kept must not keep the model.
        self._paths = weakref.WeakKeyDictionary({module: path for path, (module, _) in entries.items()})
        self._choice = choice
        self._made: dict[str, ModuleStats] = {}

    def __getitem__(self, key: str | nn.Module) -> ModuleStats:
        path = self._paths[key] if isinstance(key, nn.Module) else key
        if path not in self._made:
            self._made[path] = self._of(path)
        return self._made[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __str__(self) -> str:
        if not self:
            return "nothing was seen"
        rows = [HEADINGS, *(_cells(self[path]) for path, _ in zip(self, range(SHOWN), strict=False))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        more = [f"and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return "\n".join(lines + more)

    def _of(self, path: str) -> ModuleStats:
        entry = self._entries[path]
        before, after = (self._side(seen, entry.number) for seen in (entry.input, entry.output))
        return ModuleStats(path, str(entry.number), entry.calls, before, after, entry.written)

    def _side(self, seen: Seen, number: NumberFormat) -> TensorStats | None:
        if not seen.batches:
            return None
        found = self._choice.range_of(seen, number)
        return TensorStats(
            seen.batches,
            seen.minimum,
            seen.maximum,
            seen.absmax,
            found,
            float(scale_of(found, number)),
            seen.device,
            seen.histogram.counts.clone(),
            seen.histogram.edges,
        )


def scale_of(extent: float, number: NumberFormat) -> Tensor:
    """float32, 0-d: the range over the format's largest code, as dynamic quantization divides them."""
    with torch.inference_mode(False):
        return torch.tensor(extent, dtype=torch.float32, device="cpu") / number.qmax


def _cells(module: ModuleStats) -> tuple[str, ...]:
    sides = (cell for side in (module.input, module.output) for cell in _side_cells(side))
    return module.path, module.format, str(module.calls), *sides


def _side_cells(side: TensorStats | None) -> tuple[str, str, str]:
    if side is None:
        return "-", "-", "-"
    return f"{side.min:.4g} to {side.max:.4g}", f"{side.range:.4g}", f"{side.scale:.4g}"
