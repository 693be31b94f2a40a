"""fuse-siblings: one wide product instead of several narrow ones over the same value."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult, amend_note, joined_path, note_of
from fxquant.graphs import (
    add_call,
    autocast_regions,
    entered,
    is_written_between,
    refresh_values,
    value_of,
)
from fxquant.passes.base import Pass
from fxquant.passes.joining import CAT, JOINED_BY, why_no_joined_scale
from fxquant.passes.sites import place_before, where
from fxquant.products import LINEAR, activation_of, bias_of, products, weight_of

_SPLIT = torch.ops.aten.split_with_sizes.default
_CLONE = torch.ops.aten.clone.default


@dataclass(frozen=True)
class FuseSiblings(Pass):
    """Join the linears that read one value into a single wide linear.

    before:  q = linear(x, Wq)   k = linear(x, Wk)   v = linear(x, Wv)
    after:   q, k, v = split(linear(x, cat(Wq, Wk, Wv)))

    Siblings are found by walking the users of a value, so any number and any widths join: q/k/v of grouped-query
    attention, gate/up, the keys and values of cross-attention. Joining never changes a code: rows that have scales of
    their own keep them, and where a scale is of the whole weight, insert-qdq quantizes the parts (see `joining`).
    Convolutions of one value stay apart.
    """

    name = JOINED_BY

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        # Asked of all groups before any is joined: joining moves the memory that a value stands for.
        for group, why in [(group, _why_not(group)) for group in _sibling_groups(gm)]:
            if why:
                paths = tuple(p for n in group for p in note_of(n).paths[:1])
                result.declined.append(Declined(joined_path(paths) or where(group[0]), why, group[0].name))
            else:
                _join(gm, group)
                result.changed += 1
        return result


def _sibling_groups(gm: GraphModule) -> list[list[Node]]:
    by_value: dict[Node, list[Node]] = {}
    for node, form in products(gm):
        x = activation_of(node)
        if form.kind == "linear" and x is not None and note_of(node).spec is not None:
            by_value.setdefault(x, []).append(node)
    return [group for group in by_value.values() if len(group) > 1]


def _why_not(group: list[Node]) -> str:
    specs = list(dict.fromkeys(note_of(n).spec for n in group))
    weights = [weight_of(n) for n in group]
    if len(specs) > 1:
        return "the linears want different specs: " + ", ".join(str(s) for s in specs)
    if specs[0] is not None and (why := why_no_joined_scale(specs[0], [int(value_of(w).shape[0]) for w in weights])):
        return why
    if len({bias_of(n) is None for n in group}) > 1:
        return "some of the linears have a bias and some have none"
    if len({(value_of(n).dtype, value_of(n).device) for n in (*weights, *filter(None, map(bias_of, group)))}) > 1:
        return "the weights and biases differ in dtype or device"
    if len({value_of(n).dtype for n in group}) > 1:
        return "the products differ in dtype (autocast)"
    if any(len(w.users) > 1 for w in weights):
        return "a weight is used elsewhere too (tied or shared)"
    x = activation_of(group[0])
    if x is not None and is_written_between(x, group[0], group[-1]):
        return "the model writes to their input between them"
    return ""


def _join(gm: GraphModule, group: list[Node]) -> None:
    graph, first = gm.graph, group[0]
    weights = [weight_of(n) for n in group]
    biases = [b for n in group if (b := bias_of(n)) is not None]
    place_before([*weights, *biases], first)
    paths = tuple(p for n in group for p in note_of(n).paths)
    with graph.inserting_before(first):
        weight = add_call(graph, CAT, (weights,), like=first, made_by=FuseSiblings.name)
        bias = add_call(graph, CAT, (biases,), like=first, made_by=FuseSiblings.name) if biases else None
        args = (activation_of(first), weight) if bias is None else (activation_of(first), weight, bias)
        with entered(autocast_regions(gm).get(first, ())):
            wide = add_call(graph, LINEAR, args, like=first, made_by=FuseSiblings.name)
        for node in (weight, wide) if bias is None else (weight, bias, wide):
            amend_note(node, paths=paths)
        sizes = [int(value_of(w).shape[0]) for w in weights]
        pieces = add_call(graph, _SPLIT, (wide, sizes, -1), like=first, made_by=FuseSiblings.name)
        parts = [
            add_call(graph, operator.getitem, (pieces, i), like=n, made_by=FuseSiblings.name)
            for i, n in enumerate(group)
        ]
    for node in (pieces, *parts):
        amend_note(node, spec=None)
    for node, part in zip(group, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    _keep_consumers_running(gm, parts)


def _keep_consumers_running(gm: GraphModule, parts: list[Node]) -> None:
    """A slice of the wide result is strided.

    It is copied where a consumer's `view` can't take that, and where it would leave the graph: the caller expects the
    layout of the model, and a cached key must not keep the whole wide result alive.
    """
    contiguous = {"memory_format": torch.contiguous_format}
    for part in parts:
        if not refresh_values(gm, [part]):
            continue
        users = list(part.users)
        with gm.graph.inserting_after(part):
            copy = add_call(gm.graph, _CLONE, (part,), like=part, made_by=FuseSiblings.name, kwargs=contiguous)
        for user in users:
            user.replace_input_with(part, copy)
        refresh_values(gm, [copy])
