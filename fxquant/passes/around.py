"""What passes that fuse something into a lowered linear share: its operands by name, and what its note says;
and of those that give something to a kernel: the layout of what it makes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import amend_note, note_of
from fxquant.graphs import add_call, refresh_values, target_name
from fxquant.passes.sites import argument, torch_word

ACTIVATION_WORDS = ("relu", "relu_", "gelu", "silu", "silu_")


def activation_name(node: Node) -> str:
    """The activation function that a node computes, one of ACTIVATION_WORDS, as our ops call it."""
    name = torch_word(node).removesuffix("_")
    tanh = name == "gelu" and argument(node, 1, "approximate", "none") == "tanh"
    return "gelu_tanh" if tanh else name


def operand_of(node: Node, name: str) -> Any:
    """What a node gives to the argument of that name of its op; the default where it gives nothing."""
    place, default = _argument(node, name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def give_operand(node: Node, name: str, value: Any) -> None:
    """Set that argument: by its position where the node has one there, else by its name."""
    place, _ = _argument(node, name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def tell(node: Node, word: str, made_by: str) -> None:
    """Write into a linear's note what its kernel does beside the product."""
    note = note_of(node)
    kernel = note.kernel or target_name(node).removeprefix("fxquant.")  # of a frozen module: no rule has named it
    amend_note(node, kernel=f"{kernel} {word}", made_by=(*note.made_by, made_by))


def sizes_of(value: torch.Tensor) -> list[str]:
    """As text: comparing symbolic sizes would guard the graph, and fail where a size is known only when it runs."""
    return list(map(str, value.shape))


def _argument(node: Node, name: str) -> tuple[int, Any]:
    target: Any = node.target
    arguments = target._schema.arguments
    (place,) = (i for i, a in enumerate(arguments) if a.name == name)
    return place, arguments[place].default_value


def keep_layout(gm: GraphModule, made: Node, made_by: str) -> None:
    """A consumer needs the layout that the model's own result had: copy what the kernel made."""
    users = list(made.users)
    contiguous = {"memory_format": torch.contiguous_format}
    with gm.graph.inserting_after(made):
        copy = add_call(gm.graph, torch.ops.aten.clone.default, (made,), like=made, made_by=made_by, kwargs=contiguous)
    amend_note(copy, reason="")
    for user in users:
        user.replace_input_with(made, copy)
    refresh_values(gm, [copy])
