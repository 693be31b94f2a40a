"""Reading a graph: which nodes are sites, what became of them, which weights they read, which site feeds which."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import META_KEY, Note, note_of
from fxquant.graphs import source_line, target_name, value_of
from fxquant.products import FAKE_QUANTIZE_WEIGHT, TWO_ACTIVATIONS, form_of, weight_op
from fxquant.report.records import KINDS, Status

if TYPE_CHECKING:
    import networkx

# What `QuantConfig.spec_for` answers where the configuration itself keeps a site float; or the model door's did.
_BY_CONFIG = ("rule ", "exclude ", "include ", "not in include", "default", "embeddings ", "left float ")
_CAPTURE = "capture"
_ATTENTION = "fuse-attention"  # its one call stands for the one of the model


def is_product(node: Node) -> bool:
    """A canonical product that runs in float, or on dequantized operands."""
    return form_of(node) is not None and not note_of(node).kernel


def is_kernel(node: Node) -> bool:
    """A product on a quantized kernel: ``fxquant.int8_linear_dynamic`` and its kind, or one that reads its weight."""
    return bool(_kernel_kind(node)) or (form_of(node) is not None and bool(note_of(node).kernel))


def _kernel_kind(node: Node) -> str:
    if node.op != "call_function" or not (name := target_name(node)).startswith("fxquant."):
        return ""
    return next((kind for kind in KINDS if kind in name), "")


def is_site(node: Node) -> bool:
    return is_product(node) or is_kernel(node)


def is_left(node: Node) -> bool:
    """A node of the model, no site, that stays float with a reason: a transposed convolution, attention's products."""
    note = note_of(node)
    is_call = node.op in ("call_function", "call_method", "call_module")
    # Nodes that a pass made carry the reason of the site that they were made for.
    by_pass = not set(note.made_by) <= {_CAPTURE, _ATTENTION}
    return is_call and not is_site(node) and bool(note.reason) and note.spec is None and not by_pass


def op_of(node: Node) -> str:
    """ "linear", "conv" or "embedding" for every site, however it runs; else the op's own word: "lstm", "matmul"."""
    form = form_of(node)
    return form.kind if form is not None else _kernel_kind(node) or target_name(node).split(".")[-1]


def kernel_of(node: Node) -> str:
    """The kernel that lowering chose; empty for a node that runs on none."""
    return note_of(node).kernel or target_name(node).split(".")[-1] if is_kernel(node) else ""


def source_of(node: Node) -> str:
    return note_of(node).source or source_line(node)


def status_of(node: Node) -> Status:
    """What became of a site in the lowered graph."""
    note = note_of(node)
    if is_kernel(node):
        return "lowered"
    if note.spec is not None:
        return "training" if _is_rounded(node) else "reference"
    return _float_status(note)


def _is_rounded(product: Node) -> bool:
    """Whether the weight is a float tensor that is rounded at each call."""
    op = weight_op(product)
    return op is not None and target_name(op) == FAKE_QUANTIZE_WEIGHT


def _float_status(note: Note) -> Status:
    if is_by_config(note.reason):
        return "skipped"
    return "float" if "slower" in note.reason or note.reason == TWO_ACTIVATIONS else "declined"


def is_by_config(reason: str) -> bool:
    """True for the words that the configuration gives with its decision, whichever way that went."""
    return reason.startswith(_BY_CONFIG)


def weight_leaves(gm: GraphModule, weight_names: Collection[str]) -> dict[Node, tuple[Node, ...]]:
    """For each reported node the parameters, buffers and packed inputs that its constant operands are computed from.

    Such a leaf is a get_attr, or an input that lowering made of one: see `is_weight_input`.
    """
    below: dict[Node, tuple[Node, ...]] = {}
    found: dict[Node, tuple[Node, ...]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (node.op == "placeholder" and is_weight_input(node, weight_names)):
            below[node] = (node,)
            continue
        inputs = node.all_input_nodes
        leaves = tuple(dict.fromkeys(leaf for n in inputs for leaf in below.get(n, ())))
        if is_site(node) or is_left(node):
            found[node] = leaves
        elif inputs and all(n in below for n in inputs):
            below[node] = leaves
    return found


def is_weight_input(node: Node, weight_names: Collection[str] = ()) -> bool:
    """An input of a lowered graph that stands for a weight: lowering gave it a note, or it has one of the names."""
    is_named = node.name in weight_names or node.target in weight_names
    return node.op == "placeholder" and (is_named or META_KEY in node.meta)


def bytes_of(value: Any) -> int:
    """Bytes of a tensor, fake or real; 0 if it is none or its size is not fixed."""
    if isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape):
        return value.numel() * value.element_size()
    return 0


def leaf_bytes(gm: GraphModule, leaf: Node) -> int:
    value = value_of(leaf)
    if value is None and leaf.op == "get_attr":
        value = getattr(gm, str(leaf.target), None)
    return bytes_of(value)


def value_graph(gm: GraphModule) -> networkx.DiGraph[Node]:
    """Which node reads which, as networkx wants it."""
    import networkx  # here, since it takes longer to import than all of fxquant

    values = networkx.DiGraph()
    values.add_nodes_from(gm.graph.nodes)
    values.add_edges_from((source, node) for node in gm.graph.nodes for source in node.all_input_nodes)
    return values


def site_graph(gm: GraphModule) -> networkx.DiGraph[str]:
    """The sites by node name (attributes path, op, status, spec, kernel) and the connections between them.

    An edge from a to b: the value of a reaches b through nodes that are no sites.
    """
    import networkx

    graph = networkx.DiGraph()
    reaching: dict[Node, frozenset[str]] = {}
    for node in gm.graph.nodes:
        sources = frozenset[str]().union(*(reaching[n] for n in node.all_input_nodes))
        if is_site(node) or is_left(node):
            note = note_of(node)
            spec = "" if note.spec is None else str(note.spec)
            path = note.path or source_of(node) or node.name
            graph.add_node(
                node.name, path=path, op=op_of(node), status=status_of(node), spec=spec, kernel=kernel_of(node)
            )
            graph.add_edges_from((source, node.name) for source in sorted(sources))
            sources = frozenset((node.name,))
        reaching[node] = sources
    return graph
