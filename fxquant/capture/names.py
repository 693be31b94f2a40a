"""Names: module paths from what Dynamo and export write down, attribute names, and whose product it is."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Iterable, Sequence

from torch.fx import Graph, GraphModule, Node

_ROOT = re.compile(r"^[A-Z]\['([^']*)'\]")
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]|\.([^.\[\]]+)|\['([^']*)'\]|\[(\d+)\]")
_NOT_A_STEP = ("__dict__", "__closure__", "cell_contents", "_modules", "_parameters", "_buffers")
# What the weight of a module is called: its product is the module's; any other parameter's product has its own name.
_WEIGHT_NAMES = ("weight", "weight_orig", "weight_v", "weight_g")


def path_from_source(source: str) -> str:
    """`L['self']._modules['mlp']._parameters['weight']` → `mlp.weight`: a source of Dynamo's without its root."""
    root = _ROOT.match(source)
    steps = (next(filter(None, found.groups()), "") for found in _STEP.finditer(source[root.end() if root else 0 :]))
    path = ".".join(step for step in steps if step and step not in _NOT_A_STEP)
    return path or (root.group(1) if root else "")


def module_path(node: Node) -> str:
    """The path of the innermost module that the node was made in; empty for the root, or if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    words = [str(entry[0]) for entry in stack.values()]
    if not words or words[-1] == "_empty_nn_module_stack_from_metadata_hook":
        return ""
    word = re.sub(r"@\d+", "", words[-1])
    root = _ROOT.match(word)
    if root is None:
        return word
    return path_from_source(word) if root.end() < len(word) else ""


def attribute_names(paths: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """A Python name for each path, unique, and free in a GraphModule that already has the attributes `taken`."""
    empty, used = GraphModule({}, Graph()), set(taken)
    names = []
    for path in paths:
        name = re.sub(r"\W", "_", path) or "weight"
        if name[0].isdigit() or keyword.iskeyword(name):
            name = f"_{name}"
        unique, number = name, 1
        while unique in used or hasattr(empty, unique):
            unique, number = f"{name}_{number}", number + 1
        used.add(unique)
        names.append(unique)
    return names


def owner(weight_path: str) -> str:
    """The module that a weight's product belongs to: `mlp.fc.weight` → `mlp.fc`.

    A bare parameter keeps its name (`experts.w1`), so that two of one module can be told apart; so does a weight at
    the root, where nothing else is left. A parametrized weight belongs to the module that it parametrizes.
    """
    module, parametrized, _ = weight_path.partition(".parametrizations.")
    if parametrized:
        return module
    parent, _, last = weight_path.rpartition(".")
    return parent if parent and last in _WEIGHT_NAMES else weight_path


def best_path(stack: str, candidates: Sequence[str], named: bool) -> str:
    """Which of a site's possible paths is its own.

    `stack` is the path by Dynamo's module stack, which lacks its prefix after a graph break; `candidates` come from
    the names of the weight, several if it is tied. `named`: the names come from the model, not from Dynamo's guess.
    """
    agreements = (
        lambda path: path == stack,
        lambda path: path.startswith(f"{stack}."),
        lambda path: path.endswith(f".{stack}"),
        lambda path: f".{stack}." in path,
    )
    if stack:
        for agrees in agreements:
            if found := next((path for path in candidates if agrees(path)), ""):
                return found
    if candidates and (named or not stack):
        return candidates[0]
    return stack


def common_path(paths: Sequence[str]) -> str:
    """The path of the module that holds all the given ones."""
    shared: list[str] = []
    for column in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)
