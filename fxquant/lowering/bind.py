"""The last step of lowering: weights become inputs again, packed ones in the place of float ones.

One Dynamo graph serves many parameter sets, so a lowered graph holds no weight. Each placeholder is either an
original argument or an output of a recipe that the weight store applies to original arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.annotation import note_of, write_note
from fxquant.folding import FoldedConstant, folded_constants
from fxquant.graphs import VALUE_KEY, CapturedGraph, CapturedWeight, value_of
from fxquant.lowering.rows import quantize_rows_by_kernel, quantizes
from fxquant.lowering.rule import INT8_PACK, PACK_GRANULES, PACK_PANELS, PACK_ROWS
from fxquant.lowering.tiled import TILE_CODES, TRANSPOSE_GRANULES
from fxquant.weights import Recipe

# The ops that make a kernel's layout of one folded tensor, and what their result is called in the place of its codes.
_LAYOUTS: dict[object, str] = {
    INT8_PACK: "_packed",
    PACK_PANELS: "_packed",
    TILE_CODES: "_tiles",
    PACK_ROWS: "_rows",
    PACK_GRANULES: "",
    TRANSPOSE_GRANULES: "",
}


@dataclass(frozen=True)
class Original:
    """A placeholder that takes the argument at `position` of the captured graph's flat arguments."""

    position: int


@dataclass(frozen=True)
class Packed:
    """A placeholder that takes output `output` of recipe number `recipe`."""

    recipe: int
    output: int


@dataclass(frozen=True)
class BoundRecipe:
    """A recipe and the positions of the parameters that it is applied to.

    ``folded`` holds what ``recipe.fold`` gives for the parameter set that was captured, if it was evaluated.
    """

    recipe: Recipe
    sources: tuple[int, ...]
    folded: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Binding:
    """How the lowered graph is called: one entry in `arguments` for each placeholder, in order."""

    arguments: tuple[Original | Packed, ...]
    recipes: tuple[BoundRecipe, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Where each placeholder of a graph without packed weights stands among the original arguments."""
        return tuple(a.position for a in self.arguments if isinstance(a, Original))


def bind(gm: GraphModule, captured: CapturedGraph) -> Binding:
    """Turn every get_attr of the graph into a placeholder, and say what each placeholder takes."""
    arguments: list[Original | Packed] = [Original(position) for position in captured.inputs]
    positions = {w.name: w.position for w in captured.weights}
    last = _last_placeholder(gm)
    recipes: list[BoundRecipe] = []
    by_kernel = functools.cache(quantize_rows_by_kernel)  # equal layers share an expression
    for constant, nodes in _folded_groups(gm).values():
        outputs = _runtime_outputs(constant, nodes)
        recipes.append(_bound_recipe(gm, constant, by_kernel(constant.expression), outputs, captured))
        for index, (node, _) in enumerate(outputs):
            last = _become_placeholder(gm, node, last)
            arguments.append(Packed(len(recipes) - 1, index))
    for node in gm.graph.find_nodes(op="get_attr"):
        if not node.users:
            gm.graph.erase_node(node)
            continue
        if str(node.target) not in positions:
            continue  # a graph of torch.cond and its kind: no tensor
        weight = captured.weight(str(node.target))
        last = _become_placeholder(gm, node, last)
        last.meta.update({k: v for k, v in weight.input_meta.items() if k not in last.meta})
        arguments.append(Original(positions[weight.name]))
    gm.graph.lint()
    for name in [*positions, *folded_constants(gm)]:
        if hasattr(gm, name):
            delattr(gm, name)
    gm.recompile()
    return Binding(tuple(arguments), tuple(recipes))


def _folded_groups(gm: GraphModule) -> dict[int, tuple[FoldedConstant, list[Node]]]:
    groups: dict[int, tuple[FoldedConstant, list[Node]]] = {}
    by_name = folded_constants(gm)
    for node in gm.graph.find_nodes(op="get_attr"):
        constant = by_name.get(str(node.target))
        if constant is not None and node.users:
            groups.setdefault(id(constant), (constant, []))[1].append(node)
    return groups


def _runtime_outputs(constant: FoldedConstant, nodes: Sequence[Node]) -> list[tuple[Node, int]]:
    """The nodes whose values the graph needs at run time: a layout of a folded tensor, or the tensor itself."""
    outputs: list[tuple[Node, int]] = []
    for node in nodes:
        index = constant.names.index(str(node.target))
        layouts = [user for user in node.users if user.target in _LAYOUTS]
        outputs += [(layout, index) for layout in layouts]
        if len(layouts) < len(node.users):
            outputs.append((node, index))
    return outputs


def _bound_recipe(
    gm: GraphModule,
    constant: FoldedConstant,
    fold: GraphModule,
    outputs: Sequence[tuple[Node, int]],
    captured: CapturedGraph,
) -> BoundRecipe:
    plan = tuple(_step(node, index) for node, index in outputs)
    words = [f"{op or 'plain'}({', '.join(map(str, (index, *rest)))})" for op, index, rest in plan]
    where = tuple(_module_of(captured.weight(source)) for source in constant.sources)
    key = f"{constant.key} | {','.join(words)}"
    recipe = Recipe(key, fold, _packer(plan), where, quantizes(constant.expression))
    held = tuple(getattr(gm, name) for name in constant.names)
    evaluated = not any(isinstance(t, torch._subclasses.FakeTensor) for t in held)
    positions = tuple(captured.weight(source).position for source in constant.sources)
    return BoundRecipe(recipe, positions, held if evaluated else None)


def _module_of(weight: CapturedWeight) -> str:
    path = weight.paths[0] if weight.paths else weight.name
    return path.rpartition(".")[0] or path


Step = tuple[Any, int, tuple[Any, ...]]


def _step(node: Node, index: int) -> Step:
    """The layout op (None: as it is), the folded tensor that it is applied to, and its other arguments."""
    return (node.target, index, node.args[1:]) if node.op == "call_function" else (None, index, ())


def _packer(plan: Sequence[Step]) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def pack(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensors[i] if op is None else op(tensors[i], *rest) for op, i, rest in plan)

    return pack


def _last_placeholder(gm: GraphModule) -> Node | None:
    placeholders = gm.graph.find_nodes(op="placeholder")
    return placeholders[-1] if placeholders else None


def _become_placeholder(gm: GraphModule, node: Node, last: Node | None) -> Node:
    suffix = _LAYOUTS.get(node.target, "")
    base = str(node.target) if node.op == "get_attr" else str(node.args[0])
    base = base.removesuffix("_codes") if suffix else base
    while any(base + suffix == taken.target for taken in gm.graph.find_nodes(op="placeholder")):
        base += "_"  # codes that kernels of two kinds read, each in its own layout
    with gm.graph.inserting_after(last) if last is not None else gm.graph.inserting_before():  # at the beginning
        made = gm.graph.placeholder(base + suffix)
    made.meta[VALUE_KEY] = value_of(node)
    write_note(made, note_of(node))
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    return made
