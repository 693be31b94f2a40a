"""The command line: `fxquant quantize`, `serve`, `tune`, `kernels`. The top layer: nothing imports it."""

from __future__ import annotations

from fxquant.cli.app import app, main

__all__ = ["app", "main"]
