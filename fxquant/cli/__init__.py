"""The command line: `fxquant kernels …` and `fxquant tune …`. The top layer: nothing imports it, and typer with it."""

from __future__ import annotations

from fxquant.cli.app import app, main

__all__ = ["app", "main"]
