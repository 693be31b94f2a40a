"""Quantized models as folders of safetensors that say everything about themselves: save and load."""

from __future__ import annotations

from fxquant.checkpoint.loading import load
from fxquant.checkpoint.saving import save

__all__ = ["load", "save"]
