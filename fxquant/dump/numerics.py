"""How far each quantized site is from the float model, on one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.algorithms import quantize
from fxquant.annotation import note_of
from fxquant.numerics import decode
from fxquant.products import form_of, weight_of
from fxquant.report import SiteSqnr
from fxquant.report.walk import is_site, op_of
from fxquant.spec import LinearSpec


def measure_sqnr(
    captured: GraphModule, quantized: GraphModule, args: Sequence[Any], quantized_args: Sequence[Any] | None = None
) -> dict[str, SiteSqnr]:
    """SQNR in dB of each quantized site against the same products of the captured graph, by its node name.

    Both graphs run once on flat inputs: `args`, and for the quantized graph `quantized_args` if it takes others (a
    lowered graph takes packed weights). The output's figure holds what the site adds and what it inherits from the
    sites before it; the weight's is its own, of the float weight against what its codes stand for. Joined siblings are
    compared with the concatenation of their parts. A site that has no counterpart of its shape is left out. The outputs
    of the captured graph's products are held together: memory for one batch.
    """
    with torch.no_grad():
        wanted = _Recorder(captured, all_sites=True)
        wanted.run(*args, enable_io_processing=False)
        got = _Recorder(quantized, all_sites=False)
        got.run(*(args if quantized_args is None else quantized_args), enable_io_processing=False)
        left, measured = list(wanted.sites), {}
        for site in got.sites:
            parts = _take(left, site)
            if parts and (output := _output_sqnr(parts, site.output)) is not None:
                measured[site.node.name] = SiteSqnr(output, _weight_sqnr(parts, note_of(site.node).spec))
    return measured


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise in dB, summed in float64; inf if equal, -inf if only noise is there."""
    exact = reference.double()
    signal, noise = float(exact.square().sum()), float((exact - value.double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


# Arguments of linears, and what they are where nothing was fused.
_PLAIN = {"residual": None, "activation": ""}


@dataclass(frozen=True, eq=False)
class _Recorded:
    """What a site computed, and the weight that it read, if it is still a product with one."""

    node: Node
    output: Tensor
    weight: Tensor | None


class _Recorder(Interpreter):
    """Runs a graph and keeps the outputs of its sites, in graph order."""

    def __init__(self, gm: GraphModule, *, all_sites: bool) -> None:
        super().__init__(gm)
        self.sites: list[_Recorded] = []
        self._all_sites = all_sites

    def run_node(self, n: Node) -> Any:
        weight = self.env.get(weight_of(n)) if self._all_sites and form_of(n) is not None else None
        value = super().run_node(n)
        if is_site(n) and (self._all_sites or note_of(n).spec is not None):
            # A later node may write into the output in place.
            self.sites.append(_Recorded(n, self._product(n, value).detach().clone(), weight))
        return value

    def _product(self, site: Node, value: Tensor) -> Tensor:
        """What a site's kernel gives without the activation and the residual that were fused into it."""
        target: Any = site.target
        names = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
        args, kwargs = self.fetch_args_kwargs_from_env(site)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("residual") is None and not given.get("activation"):
            return value
        return target(**{**given, **_PLAIN})


def _output_sqnr(parts: list[_Recorded], value: Tensor) -> float | None:
    if not all(part.output.shape[:-1] == value.shape[:-1] for part in parts):
        return None
    reference = torch.cat([part.output for part in parts], dim=-1)
    return sqnr(reference, value) if reference.shape == value.shape else None


def _weight_sqnr(parts: list[_Recorded], spec: LinearSpec | None) -> float | None:
    """The weights are quantized once more: joining changes no code, and a kernel's layout can't be read back."""
    weights = [part.weight.flatten(1).float() for part in parts if part.weight is not None]
    if spec is None or spec.weights is None or len(weights) < len(parts):
        return None
    values = []
    for weight in weights:
        codes, scale, zero_point, tensor_scale = quantize(weight, spec.weights, spec.algorithm)
        values.append(decode(codes, scale, zero_point, spec.weights, torch.float32, tensor_scale))
    return sqnr(torch.cat(weights), torch.cat(values))


def _take(left: list[_Recorded], site: _Recorded) -> list[_Recorded]:
    """The next products of this site's paths, in the order in which a join puts them; they are taken out of `left`."""
    paths, op = note_of(site.node).paths, op_of(site.node)
    taken: dict[tuple[str, ...], _Recorded] = {}
    for part in left:
        own = note_of(part.node).paths
        if op_of(part.node) == op and set(own) <= set(paths) and bool(own) == bool(paths):
            taken.setdefault(own, part)
    for part in taken.values():
        left.remove(part)
    ordered = sorted(taken, key=lambda own: paths.index(own[0]) if own else 0)
    return [taken[own] for own in ordered]
