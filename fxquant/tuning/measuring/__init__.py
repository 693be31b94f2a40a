"""Measuring configurations on a device: operands, the check of the answer, samples of the time, and who is fastest."""

from __future__ import annotations

from fxquant.tuning.measuring.benches import Bench, Case, CpuBench, GpuBench

__all__ = ["Bench", "Case", "CpuBench", "GpuBench"]
