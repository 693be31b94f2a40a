"""Graphs as text worth reading: one line a node, a folder a graph, a difference between stages."""

from __future__ import annotations

from fxquant.dump.drawing import dot
from fxquant.dump.folder import Dumper
from fxquant.dump.numerics import measure_sqnr, sqnr
from fxquant.dump.printer import text

__all__ = ["Dumper", "dot", "measure_sqnr", "sqnr", "text"]
