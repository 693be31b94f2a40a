"""Graphs whose tensors Dynamo has installed as attributes, made into the form in which all of them are inputs."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor
from torch.fx import GraphModule

from fxquant.capture.assemble import copied_graph
from fxquant.capture.dynamo import STATIC_MARK


def with_tensors_as_inputs(gm: GraphModule) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """The graph with a placeholder for each tensor that it holds, behind its own ones; and these tensors.

    `gm` itself is not changed. Each of them is marked as Dynamo marks weights and buffers.
    """
    graph, _ = copied_graph(gm)
    held: dict[str, Tensor] = {}
    last = graph.find_nodes(op="placeholder")[-1:]
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        tensor = attrgetter(name)(gm)
        if not isinstance(tensor, Tensor):  # the graph of a torch.cond
            continue
        with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
            last.append(graph.placeholder(f"held_{len(held)}"))
        last[-1].meta = {**node.meta, "tensor_dict": {**(node.meta.get("tensor_dict") or {}), **STATIC_MARK}}
        node.replace_all_uses_with(last[-1])
        graph.erase_node(node)
        held[last[-1].name] = tensor
    return GraphModule(gm, graph), tuple(held.values())
