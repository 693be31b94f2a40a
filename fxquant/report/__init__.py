"""What a user asks after a compile: how much is quantized, what is not, and why not."""

from __future__ import annotations

from fxquant.report.records import ParameterFacts, Site, SiteSqnr, Uncovered, parameter_facts, quantized_weights
from fxquant.report.reports import GraphReport, ModelReport
from fxquant.report.snapshot import Snapshot, snapshot
from fxquant.report.walk import is_kernel, is_product, is_site, site_graph

__all__ = [
    "GraphReport",
    "ModelReport",
    "ParameterFacts",
    "Site",
    "SiteSqnr",
    "Snapshot",
    "Uncovered",
    "is_kernel",
    "is_product",
    "is_site",
    "parameter_facts",
    "quantized_weights",
    "site_graph",
    "snapshot",
]
