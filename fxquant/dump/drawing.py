"""The sites of a graph and how they feed one another, for Graphviz."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from fxquant.graphs import target_name
from fxquant.report.walk import is_left, is_site, site_graph, value_graph

if TYPE_CHECKING:
    import networkx

_COLORS = {
    "lowered": "palegreen",
    "reference": "khaki",
    "training": "lightblue",
    "skipped": "lightgray",
    "declined": "lightsalmon",
    "float": "lightgray",
}
_SHOWN = 3


def dot(gm: GraphModule) -> str:
    """The site graph in DOT. An edge says what stands between; one that others imply (a residual) is left out."""
    import networkx

    full = site_graph(gm)
    edges = networkx.transitive_reduction(full).edges
    lines = ["digraph sites {", '  node [shape=box, style=filled, fontname="monospace"];']
    for name, facts in full.nodes(data=True):
        op = "" if facts["op"] == "linear" else facts["op"]
        words = [facts["path"], op, facts["spec"], facts["kernel"] or facts["status"]]
        label = "\\n".join(_escaped(word) for word in words if word)
        lines.append(f'  "{name}" [label="{label}", fillcolor={_COLORS[facts["status"]]}];')
    nodes = {node.name: node for node in gm.graph.nodes}
    values = value_graph(gm)
    between = [n for n in gm.graph.nodes if not (is_site(n) or is_left(n))]
    for source, target in sorted(edges, key=lambda edge: (nodes[edge[1]], nodes[edge[0]])):
        label = _through(values, between, nodes[source], nodes[target])
        lines.append(f'  "{source}" -> "{target}"' + (f' [label="{_escaped(label)}"];' if label else ";"))
    return "\n".join([*lines, "}"]) + "\n"


def _through(values: networkx.DiGraph[Node], between: list[Node], source: Node, target: Node) -> str:
    """The ops on the shortest way from one site to the next."""
    import networkx

    way = networkx.shortest_path(values.subgraph([*between, source, target]), source, target)
    ops = [op for node in way[1:-1] if (op := target_name(node).split(".")[-1]) != "getitem"]
    if len(ops) > _SHOWN:
        return f"{ops[0]} … {ops[-1]} ({len(ops)} ops)"
    return ", ".join(ops)


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"')
