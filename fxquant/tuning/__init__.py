"""Choosing configurations of kernels: candidates, facts from compiling, measuring, caches, shipped tables."""

from __future__ import annotations

from fxquant.tuning.plans.cache import PlanCache, export_plans, import_plans, plan_folder
from fxquant.tuning.plans.lookup import caches_of, lookup
from fxquant.tuning.plans.records import Effort, Entry, Source
from fxquant.tuning.report import TuneReport, tune_problems
from fxquant.tuning.tuner import Outcome, Progress, Tuner, Watch, tuner_for, unwatched

__all__ = [
    "Effort",
    "Entry",
    "Outcome",
    "PlanCache",
    "Progress",
    "Source",
    "TuneReport",
    "Tuner",
    "Watch",
    "caches_of",
    "export_plans",
    "import_plans",
    "lookup",
    "plan_folder",
    "tune_problems",
    "tuner_for",
    "unwatched",
]
