"""The two reports: of one graph, and of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import GraphModule

from fxquant.annotation import Declined, PassResult
from fxquant.graphs import CapturedGraph
from fxquant.report import summary
from fxquant.report.collect import rows_of
from fxquant.report.records import KINDS, STATUSES, ParameterFacts, Site, SiteSqnr, Uncovered, plain, stable_text
from fxquant.report.snapshot import Snapshot, snapshot


@dataclass(frozen=True)
class GraphReport:
    """What became of one captured graph; ``str()`` is its summary.

    ``declined`` holds by pass the candidates that it left, ``misses`` the lowering rules that nearly matched.
    ``others`` are the graph's float parameters with two or more dimensions that no site reads. ``bytes_before`` and
    ``bytes_after`` are the weights of all sites, what several sites share counted once. ``seconds`` is by stage.
    ``sets``: further parameter sets that this one graph serves, each mapping a parameter name of the captured set to
    the name in that set.
    """

    name: str
    sites: tuple[Site, ...]
    declined: Mapping[str, tuple[Declined, ...]] = field(default_factory=dict)
    misses: tuple[Declined, ...] = ()
    break_reason: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    others: tuple[Uncovered, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    sets: tuple[Mapping[str, str], ...] = ()

    @staticmethod
    def of(
        name: str,
        captured: CapturedGraph | Snapshot,
        lowered: GraphModule,
        results: Mapping[str, PassResult],
        misses: Iterable[Declined] = (),
        *,
        seconds: Mapping[str, float] | None = None,
    ) -> GraphReport:
        """Read the report from the graph before and after the passes.

        Passes edit the graph in place: give the `Snapshot` taken before them, unless they worked on a copy.
        """
        before = captured if isinstance(captured, Snapshot) else snapshot(captured)
        rows = rows_of(before, lowered)
        declined = {step: tuple(map(_stable, result.declined)) for step, result in results.items() if result.declined}
        return GraphReport(
            name=name,
            sites=rows.sites,
            declined=declined,
            misses=tuple(map(_stable, misses)),
            break_reason=stable_text(before.break_reason),
            seconds=dict(seconds or {}),
            others=rows.others,
            bytes_before=rows.bytes_before,
            bytes_after=rows.bytes_after,
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many linears, convolutions and embeddings of the model have each status."""
        return self.counts_of(*KINDS)

    def counts_of(self, *ops: str) -> dict[str, int]:
        """How many products of the model with these ops have each status."""
        sites = [site for site in self.sites if site.op in ops]
        found = {status: sum(s.members for s in sites if s.status == status) for status in STATUSES}
        return {status: count for status, count in found.items() if count}

    def serving(self, sets: Iterable[Mapping[str, str]]) -> GraphReport:
        """The same report, with the other parameter sets that the graph is called with."""
        return replace(self, sets=tuple(dict(one) for one in sets))

    def with_sqnr(self, sqnr: Mapping[str, SiteSqnr]) -> GraphReport:
        """The same report with the SQNR of each site, by its node name."""
        known = ((site, sqnr.get(site.node, SiteSqnr())) for site in self.sites)
        return replace(self, sites=tuple(replace(site, sqnr=s.output, weight_sqnr=s.weight) for site, s in known))

    def fates(self) -> dict[str, str]:
        """For each parameter name, in every set served: "" if it is quantized, else why it is not."""
        fates = {row.name: row.reason for row in self.others}
        for site in self.sites:
            for name in site.parameter_names:
                if site.is_quantized:
                    fates[name] = ""
                elif name not in fates:
                    fates[name] = site.reason_with_op or site.status
        for other in self.sets:
            for name, fate in list(fates.items()):
                if name in other:
                    fates[other[name]] = fate if fates.get(other[name]) != "" else ""
        return fates

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return plain(self)

    def __str__(self) -> str:
        return summary.graph_text(self)


@dataclass(frozen=True)
class ModelReport:
    """What became of a model; ``str()`` is its summary.

    ``coverage`` is the share of the bytes in float parameters with two or more dimensions that is quantized, tied
    ones counted once; None where the model is not known. ``uncovered`` names each that is not, largest first.
    ``fallbacks`` are the modules that run in eager. ``door`` says who asked: "compile", "explain" or "backend".
    """

    graphs: tuple[GraphReport, ...]
    coverage: float | None = None
    uncovered: tuple[Uncovered, ...] = ()
    fallbacks: tuple[Site, ...] = ()
    door: str = "compile"
    matrix_bytes: int = 0
    quantized_bytes: int = 0

    @staticmethod
    def of_model(
        parameters: Mapping[str, ParameterFacts],
        graphs: Sequence[GraphReport],
        fallbacks: Sequence[Site] = (),
        *,
        door: str = "compile",
    ) -> ModelReport:
        """The report of a model whose parameters are known by name (see `parameter_facts`)."""
        fates = _fates(graphs, fallbacks)
        names: dict[int, list[str]] = {}
        for name, facts in parameters.items():
            if facts.is_matrix:
                names.setdefault(facts.identity, []).append(name)
        total = quantized = 0
        uncovered = []
        for tied in names.values():
            size = parameters[tied[0]].bytes
            known = [fates[name] for name in tied if name in fates]
            total += size
            if "" in known:
                quantized += size
            else:
                uncovered.append(Uncovered(" = ".join(tied), size, known[0] if known else _never_seen(graphs)))
        return ModelReport(
            graphs=tuple(graphs),
            coverage=quantized / total if total else 1.0,
            uncovered=tuple(sorted(uncovered, key=lambda row: -row.bytes)),
            fallbacks=tuple(fallbacks),
            door=door,
            matrix_bytes=total,
            quantized_bytes=quantized,
        )

    @staticmethod
    def of_graphs(graphs: Sequence[GraphReport]) -> ModelReport:
        """The report of the bare backend, which sees graphs and no model."""
        return ModelReport(tuple(graphs), door="backend")

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every row: the sites of all graphs, then the modules that run in eager."""
        return (*(site for graph in self.graphs for site in graph.sites), *self.fallbacks)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return plain(self)

    def __str__(self) -> str:
        return summary.model_text(self)


def _stable(declined: Declined) -> Declined:
    return replace(declined, where=stable_text(declined.where), reason=stable_text(declined.reason))


def _fates(graphs: Sequence[GraphReport], fallbacks: Sequence[Site]) -> dict[str, str]:
    fates: dict[str, str] = {}
    for graph in graphs:
        for name, fate in graph.fates().items():
            if fates.get(name) != "":
                fates[name] = fate
    for site in fallbacks:
        for name in site.parameter_names:
            if site.is_quantized or fates.get(name) != "":
                fates[name] = "" if site.is_quantized else site.reason or site.status
    return fates


def _never_seen(graphs: Sequence[GraphReport]) -> str:
    return "never seen by Dynamo" if graphs else "nothing was captured yet: call the model first"
