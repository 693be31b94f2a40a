"""The float side of a report: what the captured graph reads, noted before passes change it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxquant.annotation import note_of
from fxquant.graphs import CapturedGraph, CapturedWeight, target_name, value_of
from fxquant.report.records import unique
from fxquant.report.walk import bytes_of, is_site, op_of, weight_leaves


@dataclass(frozen=True)
class FloatWeight:
    """A parameter or buffer of the captured graph; ``readers`` are the ops that use it."""

    name: str
    paths: tuple[str, ...]
    bytes: int
    is_matrix: bool
    readers: tuple[str, ...]


@dataclass(frozen=True)
class FloatSite:
    """A product of the captured graph, and the attribute names of the float weights that it reads."""

    paths: tuple[str, ...]
    weights: tuple[str, ...]
    op: str


@dataclass(frozen=True)
class Snapshot:
    """What a graph report has to know of the graph as it was captured. Holds no tensor and no graph."""

    sites: tuple[FloatSite, ...]
    weights: Mapping[str, FloatWeight]
    break_reason: str = ""

    def model_names(self, weights: Iterable[str]) -> tuple[str, ...]:
        """Every name that the model has for these weights of the graph."""
        return unique(path for name in weights for path in self.weights[name].paths or (name,))

    def bytes(self, weights: Iterable[str]) -> int:
        return sum(self.weights[name].bytes for name in unique(weights))

    def inside(self, paths: Iterable[str]) -> tuple[str, ...]:
        """The weights that belong directly to the modules of these paths."""
        owners = set(paths)
        return tuple(n for n, w in self.weights.items() if any(p.rpartition(".")[0] in owners for p in w.paths))


def snapshot(captured: CapturedGraph) -> Snapshot:
    """Read a captured graph. Call it before the passes run: they edit the graph in place."""
    names = {weight.name for weight in captured.weights}
    leaves = weight_leaves(captured.gm, names)
    sites = tuple(
        FloatSite(note_of(node).paths, tuple(str(leaf.target) for leaf in found if leaf.target in names), op_of(node))
        for node, found in leaves.items()
        if is_site(node)
    )
    attributes: dict[str, list[Node]] = {}
    for node in captured.gm.graph.nodes:
        if node.op == "get_attr":
            attributes.setdefault(str(node.target), []).append(node)
    weights = {w.name: _float_weight(captured, w, attributes.get(w.name, [])) for w in captured.weights}
    return Snapshot(sites, weights, captured.break_reason)


def _float_weight(captured: CapturedGraph, weight: CapturedWeight, nodes: list[Node]) -> FloatWeight:
    known = [value_of(node) for node in nodes]
    known += [getattr(captured.gm, weight.name, None)]
    known += [weight.input_meta.get("val"), weight.input_meta.get("example_value")]
    value = next((v for v in known if isinstance(v, torch.Tensor)), None)
    is_matrix = weight.is_parameter and value is not None and value.is_floating_point() and value.dim() >= 2
    readers = unique(target_name(user) for node in nodes for user in node.users if user.op != "output")
    return FloatWeight(weight.name, weight.paths, bytes_of(value), is_matrix, readers)
