"""What a graph will run on, and what is asked of a kernel: plain frozen data that all layers above share."""

from __future__ import annotations

from fxquant.target.config import KernelConfig, Plan, PlanRow
from fxquant.target.gpus import ARCHS, Arch, Board, arch_named
from fxquant.target.machine import Target
from fxquant.target.problem import M_BUCKETS, Op, Problem, Work, bucket_of

__all__ = [
    "ARCHS",
    "M_BUCKETS",
    "Arch",
    "Board",
    "KernelConfig",
    "Op",
    "Plan",
    "PlanRow",
    "Problem",
    "Target",
    "Work",
    "arch_named",
    "bucket_of",
]
