"""The model of time: how long a configuration takes on a GPU that need not be here; `docs/gpu-model.md` says how."""

from __future__ import annotations

from fxquant.tuning.model.modelled import Modelled, modelled_time

__all__ = ["Modelled", "modelled_time"]
