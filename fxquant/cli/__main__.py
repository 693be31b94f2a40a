"""`python -m fxquant.cli`: the `fxquant` script where it is not installed."""

from __future__ import annotations

from fxquant.cli import main

main()
