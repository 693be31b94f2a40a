"""The warning of modules that want a calibration and have had none."""

from __future__ import annotations

import warnings

from fxquant.errors import UncalibratedWarning
from fxquant.nn import recording


def warn_uncalibrated(paths: list[str]) -> None:
    """Warn once for all modules that share the list, which is emptied; not while a calibration sees them."""
    if paths and not recording.ACTIVE:
        warnings.warn(UncalibratedWarning(tuple(paths)), stacklevel=4)
        paths.clear()


# What torch._dynamo.assume_constant_result sets, whose import takes longer than all of ours: Dynamo calls the function
# while it traces, so that a compiled model warns too.
warn_uncalibrated._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
