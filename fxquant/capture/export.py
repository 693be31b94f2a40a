"""The door from torch.export: an ExportedProgram becomes a captured graph."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from fxquant.capture.assemble import copied_graph, fill_missing_value, make_canonical, module_around
from fxquant.capture.names import attribute_names
from fxquant.graphs import CapturedGraph, CapturedWeight

_GUARDS = "_guards_fn"


def from_export(program: ExportedProgram) -> CapturedGraph:
    """The canonical graph of an exported program; the program is not changed.

    Calling convention: the flat arguments are the user's inputs as export flattened them (`program.call_spec.in_spec`
    tells how), followed by the weights in the order of `weights`. The result is the flat tuple of the user's outputs
    (`program.call_spec.out_spec`). Buffers that the program writes to are written in place, as in the model.
    """
    unlifted = program.module()
    assert isinstance(unlifted, GraphModule)
    graph, _ = copied_graph(unlifted)
    graph.set_codegen(CodeGen())  # flat in, flat out
    _strip_guards(graph)
    found = _find_weights(graph, unlifted, program)
    captured = module_around(graph, {w.name: w.tensor for w in found}, unlifted)
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            fill_missing_value(node)
    make_canonical(captured, {w.name: w.paths for w in found}, named=True)
    count = len(graph.find_nodes(op="placeholder"))
    weights = tuple(
        CapturedWeight(w.name, w.paths, count + i, isinstance(w.tensor, nn.Parameter)) for i, w in enumerate(found)
    )
    return CapturedGraph(captured, tuple(range(count)), weights, count + len(weights))


@dataclass(frozen=True)
class _Weight:
    tensor: torch.Tensor
    paths: tuple[str, ...]
    name: str


def _strip_guards(graph: Graph) -> None:
    """Erase the call that checks the inputs against what was exported: export's own module keeps it."""
    for node in graph.find_nodes(op="call_module", target=_GUARDS):
        graph.erase_node(node)


def _find_weights(graph: Graph, unlifted: GraphModule, program: ExportedProgram) -> list[_Weight]:
    """Give each tensor that the graph reads one get_attr node with a flat name; tied names become one."""
    nodes: dict[int, list[Node]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        tensor = attrgetter(str(node.target))(unlifted)
        if isinstance(tensor, torch.Tensor):
            nodes.setdefault(id(tensor), []).append(node)
            tensors[id(tensor)] = tensor
    state = {**program.state_dict, **program.constants}
    paths = {key: [name for name, tensor in state.items() if tensor is tensors[key]] for key in nodes}
    for key, group in nodes.items():
        paths[key] += [str(n.target) for n in group if str(n.target) not in paths[key]]
    taken = [n.name for n in graph.find_nodes(op="placeholder")]
    names = attribute_names((p[0] for p in paths.values()), taken)
    for (first, *others), name in zip(nodes.values(), names, strict=True):
        first.target = name
        for other in others:
            other.replace_all_uses_with(first)
            graph.erase_node(other)
    return [_Weight(tensors[key], tuple(paths[key]), name) for key, name in zip(nodes, names, strict=True)]
