"""How far each quantized site is from the float model, on one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.annotation import note_of
from fxquant.report.walk import is_site


def measure_sqnr(
    captured: GraphModule, quantized: GraphModule, args: Sequence[Any], quantized_args: Sequence[Any] | None = None
) -> dict[str, float]:
    """SQNR in dB of each quantized site against the same products of the captured graph, by its node name.

    Both graphs run once on flat inputs: `args`, and for the quantized graph `quantized_args` if it takes others (a
    lowered graph takes packed weights). The figure holds what the site adds and what it inherits from the sites before
    it. Joined siblings are compared with the concatenation of their parts. A site that has no counterpart of
    its shape is left out. The outputs of the captured graph's products are held together: memory for one batch.
    """
    with torch.no_grad():
        wanted = _Recorder(captured, all_sites=True)
        wanted.run(*args, enable_io_processing=False)
        got = _Recorder(quantized, all_sites=False)
        got.run(*(args if quantized_args is None else quantized_args), enable_io_processing=False)
    left = list(wanted.outputs)
    measured = {}
    for node, value in got.outputs:
        parts = _take(left, note_of(node).paths)
        if parts and all(part.shape[:-1] == value.shape[:-1] for part in parts):
            reference = torch.cat(parts, dim=-1)
            if reference.shape == value.shape:
                measured[node.name] = sqnr(reference, value)
    return measured


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise in dB, summed in float64; inf if equal, -inf if only noise is there."""
    exact = reference.double()
    signal, noise = float(exact.square().sum()), float((exact - value.double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class _Recorder(Interpreter):
    """Runs a graph and keeps the outputs of its sites, in graph order."""

    def __init__(self, gm: GraphModule, *, all_sites: bool) -> None:
        super().__init__(gm)
        self.outputs: list[tuple[Node, Tensor]] = []
        self._all_sites = all_sites

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if is_site(n) and (self._all_sites or note_of(n).spec is not None):
            # A later node may write into the output in place.
            self.outputs.append((n, value.detach().clone()))
        return value


def _take(left: list[tuple[Node, Tensor]], paths: tuple[str, ...]) -> list[Tensor]:
    """The next products of these paths, in the order in which a join puts them; they are taken out of `left`."""
    taken: dict[tuple[str, ...], tuple[Node, Tensor]] = {}
    for node, value in left:
        own = note_of(node).paths
        if set(own) <= set(paths) and bool(own) == bool(paths):
            taken.setdefault(own, (node, value))
    for item in taken.values():
        left.remove(item)
    ordered = sorted(taken, key=lambda own: paths.index(own[0]) if own else 0)
    return [taken[own][1] for own in ordered]
