"""The rows of a graph report, read from the lowered graph and the snapshot of the captured one."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.annotation import Note, note_of
from fxquant.products import FROZEN
from fxquant.report.records import Site, Uncovered, stable_text, unique
from fxquant.report.snapshot import FloatSite, Snapshot
from fxquant.report.walk import (
    is_by_config,
    is_product,
    is_site,
    kernel_of,
    leaf_bytes,
    op_of,
    source_of,
    status_of,
    weight_leaves,
)
from fxquant.spec import LinearSpec


@dataclass(frozen=True)
class Rows:
    """The sites, the matrices of the graph that no site reads, and the bytes of all sites; shared ones count once."""

    sites: tuple[Site, ...]
    others: tuple[Uncovered, ...]
    bytes_before: int
    bytes_after: int


def rows_of(before: Snapshot, lowered: GraphModule) -> Rows:
    """Read every row of the lowered graph."""
    leaves = weight_leaves(lowered, before.weights)
    origins = _origins(before, [node for node in leaves if is_site(node)])
    read: dict[Node, tuple[str, ...]] = {
        node: _weights_of(before, node, found, origins.get(node, ())) for node, found in leaves.items()
    }
    sites = tuple(
        _site(before, lowered, node, leaves[node], read[node], max(1, len(origins.get(node, ())))) for node in leaves
    )
    covered = {name for names in read.values() for name in names}
    others = tuple(
        Uncovered(before.model_names([w.name])[0], w.bytes, _why_unread(w.readers))
        for w in before.weights.values()
        if w.is_matrix and w.name not in covered
    )
    all_leaves = dict.fromkeys(leaf for found in leaves.values() for leaf in found)
    after = {str(leaf.target): leaf_bytes(lowered, leaf) for leaf in all_leaves}
    return Rows(sites, others, before.bytes(sorted(covered)), sum(after.values()))


def _site(
    before: Snapshot, lowered: GraphModule, node: Node, leaves: tuple[Node, ...], weights: tuple[str, ...], members: int
) -> Site:
    note, status = note_of(node), status_of(node)
    float_bytes = before.bytes(weights)
    quantized = status in ("lowered", "reference")
    return Site(
        paths=note.paths,
        status=status,
        spec_text="" if note.spec is None else str(note.spec),
        kernel=kernel_of(node),
        reason=_reason(note),
        source=stable_text(source_of(node)),
        parameter_names=before.model_names(weights),
        bytes_before=float_bytes,
        bytes_after=sum(leaf_bytes(lowered, leaf) for leaf in leaves) if quantized else float_bytes,
        op=op_of(node),
        members=members,
        node=node.name,
        algorithm="" if note.reason == FROZEN else _algorithm(note.spec),  # codes do not tell how they were chosen
    )


def _reason(note: Note) -> str:
    """Why a site runs as it does.

    With a spec, words such as 'default' say why it has one; what follows them says what a site of its kind can't have.
    """
    if note.spec is None or not is_by_config(note.reason):
        return stable_text(note.reason)
    return note.reason.partition("; ")[2]


def _algorithm(spec: LinearSpec | None) -> str:
    """How the codes of the weight are chosen; "auto" by its own name."""
    if spec is None or spec.weights is None:
        return ""
    plain = "minmax" if spec.weights.has_zero_point else "absmax"
    return plain if spec.algorithm == "auto" else spec.algorithm


def _weights_of(
    before: Snapshot, node: Node, leaves: tuple[Node, ...], origins: tuple[FloatSite, ...]
) -> tuple[str, ...]:
    """The float weights that a site of the lowered graph stands for, as attribute names of the captured graph."""
    direct = [name for leaf in leaves for name in (str(leaf.target), leaf.name) if name in before.weights]
    known = unique([*(name for origin in origins for name in origin.weights), *direct])
    is_quantized = is_site(node) and (not is_product(node) or note_of(node).spec is not None)
    if is_quantized and not any(before.weights[name].is_matrix for name in known):
        return unique([*before.inside(note_of(node).paths), *known])
    return known


def _origins(before: Snapshot, sites: list[Node]) -> dict[Node, tuple[FloatSite, ...]]:
    """Which products of the captured graph each site stands for.

    A site takes one product for each of its paths, in graph order (a shared module has several products under one
    path). What is then left was joined into the last site of that path.
    """
    left = list(before.sites)
    origins: dict[Node, list[FloatSite]] = {}
    for node in sites:
        taken: dict[tuple[str, ...], FloatSite] = {}
        for origin in left:
            if _belongs(origin, node):
                taken.setdefault(origin.paths, origin)
        origins[node] = list(taken.values())
        taken_ids = {id(origin) for origin in taken.values()}
        left = [origin for origin in left if id(origin) not in taken_ids]
    for origin in left:
        last = next((node for node in reversed(sites) if _belongs(origin, node)), None)
        if last is not None:
            origins[last].append(origin)
    return {node: tuple(found) for node, found in origins.items()}


def _belongs(origin: FloatSite, node: Node) -> bool:
    paths = note_of(node).paths
    if origin.op != op_of(node):
        return False
    return set(origin.paths) <= set(paths) if origin.paths else not paths


def _why_unread(readers: tuple[str, ...]) -> str:
    if not readers:
        return "nothing in the graph reads it"
    return f"read by {', '.join(readers)}, which is no product that is quantized"
