"""Calibration: from the values that pass through a model to the static scales of its activations."""

from __future__ import annotations

from fxquant.calibration.calibration import Calibration
from fxquant.calibration.ranges import OBSERVERS
from fxquant.calibration.stats import CalibrationStats, ModuleStats, TensorStats

__all__ = ["OBSERVERS", "Calibration", "CalibrationStats", "ModuleStats", "TensorStats"]
