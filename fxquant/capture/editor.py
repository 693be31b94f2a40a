"""The means by which capture rewrites a graph: new nodes with values, and each product's place in the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.annotation import Note, amend_note, note_of, write_note
from fxquant.capture.names import best_path, common_path, module_path, owner
from fxquant.graphs import (
    VALUE_KEY,
    add_call,
    autocast_regions,
    constant_inputs,
    constant_nodes,
    entered,
    source_line,
    value_of,
    written_nodes,
)
from fxquant.products import LINEAR

MADE_BY = "capture"
_CODES = "_codes"  # what follows the name of a frozen weight: see `fxquant.nn.forms`
_OWNER = "_owner"  # where a module keeps the one that holds its weight: see `fxquant.nn.base`


@dataclass(frozen=True)
class ModelPaths:
    """The model's paths of each weight, by attribute name; `named` if they come from the model itself."""

    paths: Mapping[str, tuple[str, ...]]
    named: bool

    def site(self, node: Node, weight: Node) -> str:
        """The module path of the product `node` with the constant expression `weight`."""
        stack, sources = module_path(node), self._of_matrices(weight)
        if len(sources) == 1:
            return best_path(stack, [owner(path) for path in sources[0]], self.named)
        owners = [owner(paths[0]) for paths in sources]
        whole = common_path(owners)
        if any(path == stack or path.startswith(f"{stack}.") for path in owners):
            return stack
        return whole if whole.endswith(f".{stack}") or not stack else stack

    def holder(self, node: Node, weight: Node, levels: int) -> str:
        """The path of the module `levels` above the parameter that `weight` comes from; `node` is made in it."""
        sources = self._of_matrices(weight)
        candidates = [".".join(path.split(".")[:-levels]) for paths in sources for path in paths]
        return best_path(module_path(node), candidates, self.named)

    def user(self, node: Node, codes: Node) -> str:
        """The path of the module that reads these codes, which may be another one's (tied weights).

        Dynamo may have come to the owner by way of such a reader, and then names it so.
        """
        names, stack = [str(n.target) for n in constant_inputs([codes])], module_path(node)
        candidates = [owner(path.removesuffix(_CODES)) for name in names for path in self.paths.get(name, ())]
        return best_path("" if _OWNER in stack.split(".") else stack, candidates, named=False)

    def _of_matrices(self, weight: Node) -> list[tuple[str, ...]]:
        sources = [n for n in constant_inputs([weight]) if value_of(n).dim() >= 2] or constant_inputs([weight])
        return [self.paths[name] for n in sources if (name := str(n.target)) in self.paths]


class Editor:
    """Adds calls to a captured graph in front of a node, in that node's name and under its autocast region."""

    def __init__(self, gm: GraphModule, model: ModelPaths) -> None:
        self.gm = gm
        self.model = model
        self._autocast = autocast_regions(gm)
        self._constant_at_first = self.constants()

    def constants(self) -> set[Node]:
        """Constant nodes whose value stays: without the expressions of weights that the graph itself writes to."""
        return constant_nodes(self.gm) - written_nodes(self.gm)

    def call(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new call in front of `like`, with its value."""
        with self.gm.graph.inserting_before(like), self.region(like):
            return add_call(self.gm.graph, target, args, like=like, made_by=MADE_BY, kwargs=kwargs)

    def region(self, node: Node) -> AbstractContextManager[None]:
        """The autocast state that the graph has entered where `node` stands: values are inferred under it."""
        return entered(self._autocast.get(node, ()))

    def linear(self, like: Node, x: Node, weight: Node, bias: Node | None = None) -> Node:
        """The canonical product of a matrix."""
        return self.product(like, LINEAR, (x, weight) if bias is None else (x, weight, bias), weight)

    def product(self, like: Node, target: Any, args: tuple[Any, ...], weight: Node) -> Node:
        """A canonical product, named after the owner of the weight."""
        node = self.call(like, target, *args)
        amend_note(node, paths=_one(self.model.site(like, weight)))
        return node

    def turn_into(self, node: Node, target: Any, args: tuple[Any, ...], weight: Node) -> None:
        """Make a call a canonical product that computes the same: nothing about it changes but how it is called."""
        node.target, node.args, node.kwargs = target, args, {}
        amend_note(node, paths=_one(self.model.site(node, weight)))

    def replace(self, node: Node, new: Node) -> None:
        """Let `new` stand for `node`: same users, same value, and what then has no user is erased."""
        new.meta[VALUE_KEY] = value_of(node)
        node.replace_all_uses_with(new)
        self.erase(node)

    def erase(self, node: Node) -> None:
        """Erase a replaced node, and pure constant expressions (a transposed weight) that only it used."""
        operands = node.all_input_nodes
        self.gm.graph.erase_node(node)
        for operand in operands:
            if operand in self._constant_at_first and operand.op != "get_attr" and not operand.users:
                self.erase(operand)


def write_first_notes(gm: GraphModule) -> None:
    """Give each call its module path and its source line."""
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            write_note(node, Note(paths=_one(module_path(node)), source=source_line(node)))


def give_reason(node: Node, reason: str, path: str = "") -> None:
    """Write why a product is not in the canonical form."""
    amend_note(node, reason=reason, paths=_one(path) or note_of(node).paths)


def substitute(node: Node, value: Any) -> None:
    """Put `value` (a node, None, or a tuple of them) wherever `node` is used, and erase `node`."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: value if n is node else n)
    node.graph.erase_node(node)


def bound_arguments(node: Node, *names: str) -> list[Any]:
    """The arguments of a call by position, looked up by keyword (`"input|self"`: either) where not positional."""
    found = list(node.args[: len(names)])
    missing = (name.split("|") for name in names[len(found) :])
    return found + [next((node.kwargs[key] for key in keys if key in node.kwargs), None) for keys in missing]


def is_transformed(node: Node) -> bool:
    """Whether the node works on values inside a function transform (`torch.vmap`): nothing may be rewritten there."""
    values = [value_of(n) for n in (node, *node.all_input_nodes)]
    return any(isinstance(v, torch.Tensor) and is_functorch_wrapped_tensor(v) for v in values)


def _one(path: str) -> tuple[str, ...]:
    return (path,) if path else ()
