"""The ops `torch.ops.fxquant.*`, declared when this package is imported: schema, fake, reference, gradient."""

from __future__ import annotations

from fxquant.ops import gpu, reference

__all__ = ["gpu", "reference"]
