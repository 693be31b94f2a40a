"""The graph that passes work on, and the few questions all of them ask it.

A captured graph is an ordinary, runnable ``GraphModule``. Every parameter and buffer of the model is a ``get_attr``
node, every other input a placeholder, and every node carries its fake value in ``meta["val"]``.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.annotation import Note, note_of, write_note

VALUE_KEY = "val"


@dataclass(frozen=True)
class CapturedWeight:
    """One parameter or buffer of the captured graph.

    ``name`` is its attribute in the graph module, ``paths`` every name that the model has for it (several if tied; the
    best guess from Dynamo's source if the model is not known), ``position`` its place in the original flat arguments.
    ``input_meta`` is the original placeholder's meta: marks such as Dynamo's static-input mark travel in it.
    """

    name: str
    paths: tuple[str, ...]
    position: int
    is_parameter: bool
    input_meta: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)


@dataclass
class CapturedGraph:
    """The canonical graph and how its inputs map to the arguments that the caller passes.

    ``inputs[i]`` is the original position of the i-th placeholder. The module's attributes are the parameters and
    buffers of the set that was captured, until ``release``.
    """

    gm: GraphModule
    inputs: tuple[int, ...]
    weights: tuple[CapturedWeight, ...]
    argument_count: int
    break_reason: str = ""

    def weight(self, name: str) -> CapturedWeight:
        return next(w for w in self.weights if w.name == name)

    def copy(self) -> CapturedGraph:
        """The same with a graph of its own, for passes to edit; tensors and fake values are shared."""
        return replace(self, gm=copy_of(self.gm))

    def release(self) -> None:
        """Let go of the parameters: the graph keeps their fake values only.

        One graph serves many parameter sets; it must not keep the first one alive.
        """
        for node in self.gm.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            held = getattr(self.gm, name)  # a graph of torch.cond and its kind is no tensor, and stays
            if isinstance(held, torch.Tensor) and not isinstance(held, torch._subclasses.FakeTensor):
                delattr(self.gm, name)
                setattr(self.gm, name, value_of(node))


def copy_of(gm: GraphModule) -> GraphModule:
    """A GraphModule with its own graph and the same tensors; meta dictionaries are copied, their values are not."""
    graph = Graph()
    output = graph.graph_copy(gm.graph, {})
    if output is not None:
        graph.output(output)
    for node, twin in zip(gm.graph.nodes, graph.nodes, strict=True):
        twin.meta = dict(node.meta)
    return GraphModule({name: getattr(gm, name) for name in _attribute_names(gm)}, graph)


def _attribute_names(gm: GraphModule) -> list[str]:
    return list(dict.fromkeys(str(n.target) for n in gm.graph.find_nodes(op="get_attr")))


def value_of(node: Node) -> Any:
    """The node's fake value: a FakeTensor, a SymInt, a tuple of them, …"""
    return node.meta.get(VALUE_KEY)


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake mode that the graph's values belong to."""
    for node in gm.graph.nodes:
        value = value_of(node)
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def infer_value(node: Node, fake_mode: FakeTensorMode) -> Any:
    """What the node computes on its inputs' fake values. Raises what the operation raises."""
    args = map_arg(node.args, value_of)
    kwargs = map_arg(node.kwargs, value_of)
    if node.target is operator.getitem and isinstance(args[0], tuple) and isinstance(args[1], int):
        return args[0][args[1]]  # most of the nodes that passes make: no tensor is computed
    with fake_mode, torch.no_grad():
        if node.op == "call_method":
            receiver, *rest = args
            return getattr(receiver, str(node.target))(*rest, **kwargs)
        if node.op == "call_function":
            # Below autograd: the autograd key of a custom op takes as long as the rest of it.
            with torch._C._AutoDispatchBelowAutograd() if is_ours(node) else contextlib.nullcontext():
                return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    raise TypeError(f"no value can be inferred for a {node.op} node")


def add_call(
    graph: Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    like: Node,
    made_by: str,
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """A new call node with its value inferred; module stack, stack trace and paths are taken from `like`."""
    # Named by the op alone, as Dynamo and export do: `linear`, not `linear_default`.
    node = graph.create_node("call_function", target, args, kwargs or {}, name=_word(target).split(".")[-1])
    inherit_meta(node, like, made_by)
    tensors = [value_of(n) for n in (*node.all_input_nodes, like)]
    mode = next((t.fake_mode for t in tensors if isinstance(t, torch._subclasses.FakeTensor)), None)
    node.meta[VALUE_KEY] = infer_value(node, mode or FakeTensorMode(allow_non_fake_inputs=True))
    return node


def inherit_meta(node: Node, like: Node, made_by: str) -> None:
    """Give a new node the provenance of the one that it stands for."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    old = note_of(like)
    story = old.made_by if made_by in old.made_by else (*old.made_by, made_by)
    write_note(node, Note(old.paths, old.spec, old.reason, story, old.kernel, old.source or source_line(like)))


def refresh_values(gm: GraphModule, changed: Iterable[Node]) -> list[Node]:
    """Recompute the values downstream of `changed`.

    Returns the nodes that can no longer run on them, and the output node if a tensor would leave in another layout.
    """
    mode, regions = fake_mode_of(gm), autocast_regions(gm)
    queue = [user for node in changed for user in node.users]
    heapq.heapify(queue)  # in graph order, and only what is downstream: a large graph has hundreds of joins
    broken: list[Node] = []
    last = None
    while queue:
        node = heapq.heappop(queue)
        if node is last or node.op not in ("call_function", "call_method", "output"):
            continue
        last = node
        if node.op == "output":
            broken.append(node)
            continue
        try:
            with entered(regions.get(node, ())):
                value = infer_value(node, mode)
        except (RuntimeError, ValueError, TypeError):
            broken.append(node)
            continue
        if _layout(value) != _layout(value_of(node)):
            node.meta[VALUE_KEY] = value
            for user in node.users:
                heapq.heappush(queue, user)
    return broken


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(map(str, value.shape)), tuple(map(str, value.stride())))
    if isinstance(value, (tuple, list)):
        return tuple(_layout(v) for v in value)
    return str(value)


Region = Sequence[Sequence[Any]]


def autocast_regions(gm: GraphModule) -> Mapping[Node, Region]:
    """The nodes that stand in an autocast region of the graph: arguments of each autocast that is entered there."""
    regions: dict[Node, Region] = {}
    open_ones: dict[Node, Sequence[Any]] = {}
    if not gm.graph.find_nodes(op="call_function", target=_enter_autocast):
        return regions
    for node in gm.graph.nodes:
        if open_ones:
            regions[node] = tuple(open_ones.values())
        if node.target is _enter_autocast:
            names = ("device_type", "dtype", "enabled", "cache_enabled")
            open_ones[node] = [*node.args, *(node.kwargs.get(name) for name in names[len(node.args) :])]
        elif node.target is _exit_autocast:
            open_ones.pop(node.all_input_nodes[0], None)
    return regions


@contextlib.contextmanager
def entered(region: Region) -> Iterator[None]:
    """The autocast state of a region: values of its nodes are inferred under it."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in region:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


_IMPURE = re.compile(r"rand|dropout|bernoulli|empty|multinomial|poisson|^normal$")
_IN_PLACE = re.compile(r"[a-z0-9]_$|^(setitem|iadd|isub|imul|itruediv|ifloordiv|imod|ipow|iand|ior|ixor|i[lr]shift)$")

# With max_norm they shorten the rows that they look up.
_RENORMING = (torch.nn.functional.embedding, torch.nn.functional.embedding_bag)


def constant_nodes(gm: GraphModule) -> set[Node]:
    """Nodes whose value depends on parameters and buffers only; unless written to, folding may compute it ahead."""
    constant: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op in ("call_function", "call_method") and node.all_input_nodes:
            pure = not _IMPURE.search(target_name(node))
            if pure and constant.issuperset(node.all_input_nodes):
                constant.add(node)
    return constant


def written_by(node: Node) -> list[Node]:
    """The operands that the call writes to in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    written = [node.kwargs.get("out")]
    if _IN_PLACE.search(target_name(node)) or _says_inplace(node):
        written += node.args[:1]
    if node.target in _RENORMING and _argument(node, 3, "max_norm") is not None:
        written.append(_argument(node, 1, "weight"))
    for index, argument in enumerate(_schema_arguments(node.target)):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(_argument(node, index, argument.name))
    found: dict[Node, None] = {}
    map_arg(written, lambda n: found.setdefault(n))
    return list(found)


def _argument(node: Node, place: int, name: str) -> Any:
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _says_inplace(node: Node) -> bool:
    if node.kwargs.get("inplace") is True or True not in node.args or node.op != "call_function":
        return node.kwargs.get("inplace") is True
    try:
        names = list(inspect.signature(node.target).parameters)  # pyright: ignore[reportArgumentType]
    except ValueError:  # a function of C without a signature: none of those takes inplace
        return False
    return "inplace" in names[: len(node.args)] and node.args[names.index("inplace")] is True


def _schema_arguments(target: Any) -> Sequence[Any]:
    if isinstance(target, torch._ops.OpOverloadPacket) and "default" in target.overloads():
        target = target.default
    return target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()


def written_nodes(gm: GraphModule) -> set[Node]:
    """Nodes whose memory some call writes to in place (a cache, running statistics), and all computed from them.

    Their values change while the graph runs: constants among them are never to be folded.
    """
    memory = {_memory(n) for node in gm.graph.nodes for n in written_by(node)}
    written: set[Node] = set()
    for node in gm.graph.nodes if memory else ():
        if _memory(node) in memory or not written.isdisjoint(node.all_input_nodes):
            written.add(node)
    return written


def is_written_between(value: Node, first: Node, last: Node) -> bool:
    """Whether a call from `first` to `last` writes to the memory of `value`."""
    node = first
    while node is not last:
        if any(_memory(written) == _memory(value) for written in written_by(node)):
            return True
        node = node.next
    return False


def _memory(node: Node) -> Any:
    """What two nodes have in common if they are views of one tensor; of other values, the node itself."""
    value = value_of(node)
    is_dense = isinstance(value, torch.Tensor) and value.layout is torch.strided
    try:
        return value.untyped_storage()._cdata if is_dense else node
    except NotImplementedError:  # inside torch.vmap a value has no storage of its own
        return node


def remove_dead(gm: GraphModule) -> None:
    """Erase constants, and nodes of fxquant's own ops, that nobody reads any more.

    Nothing else: torch's elimination would take ``x.add_(1)`` for dead.
    """
    constant = constant_nodes(gm)
    for node in reversed(gm.graph.nodes):
        ours = is_ours(node) or node.target is operator.getitem
        if not node.users and (node in constant or ours) and not written_by(node):
            gm.graph.erase_node(node)


def is_ours(node: Node) -> bool:
    """A call of one of fxquant's ops."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxquant"


def target_name(node: Node) -> str:
    """A short stable word for what a node calls: ``linear``, ``aten.linear``, ``fxquant.int8_linear``, ``view``."""
    return _word(node.target)


def _word(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", str(target))


def source_line(node: Node) -> str:
    """``file.py:line`` of the user's code that made the node (torch's frames and ours are passed over), or empty."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    for file, line in reversed(places):
        if not file.startswith(_LIBRARIES):
            return f"{os.path.basename(file)}:{line}"
    return ""


_LIBRARIES = tuple(os.path.dirname(package) + os.sep for package in (torch.__file__, __file__))


def ancestors(nodes: Iterable[Node]) -> list[Node]:
    """The nodes and all that they are computed from, in graph order."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return sorted(seen)


def constant_inputs(nodes: Iterable[Node]) -> list[Node]:
    """The get_attr nodes that the given constant nodes are computed from, in graph order."""
    return [n for n in ancestors(nodes) if n.op == "get_attr"]
