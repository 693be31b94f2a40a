"""Calibrations that saw bad values or none, and modules that were not calibrated."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.errors.base import FxQuantError
from fxquant.errors.words import listed


class NonFiniteActivation(FxQuantError, ValueError):
    """NaN or infinity among the values from which a calibration takes a range; `path` names the module."""

    def __init__(self, path: str, side: str, count: int, total: int) -> None:
        self.path = path
        super().__init__(
            f"calibration: {count} of {total} values in the {side} of module {path!r} are NaN or infinity, which have "
            "no range; the batch was not counted. Check the data and the float model, float16 overflow above all; or "
            "leave this module's activations float."
        )


class CalibrationOpen(FxQuantError, RuntimeError):
    """One `Calibration` entered twice at a time."""

    def __init__(self) -> None:
        super().__init__(
            "this Calibration is open already: leave its block before it is entered again, or nest another one."
        )


class NothingRecorded(FxQuantError, RuntimeError):
    """A picture asked of a `Calibration` that has seen no value."""

    def __init__(self) -> None:
        super().__init__(
            "this Calibration has seen no value: run data through a model with quantized activations in its block."
        )


class UncalibratedWarning(UserWarning):
    """Modules whose activations are to be static, used before a `Calibration` has seen them; `paths` names them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        super().__init__(
            f"activations of {listed(paths)} are to be quantized with a calibrated range, but no calibration has "
            "seen them: each call takes the range of its own input. Run sample data under "
            "`with fxquant.Calibration():` first."
        )


class UncalibratedModules(UserWarning):
    """Modules with quantized activations that no value of a `Calibration` reached; `paths` names them, () all."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        met = (
            f"the calibration reached no value of {listed(self.paths)}: no scale was set there, an earlier one stays"
            if paths
            else "the calibration reached no module whose activations it could calibrate: no scale was set"
        )
        super().__init__(
            f"{met}. Run data that uses these modules inside the block; "
            "quantize(model, activations='int8') says which activations are quantized."
        )
