"""fuse-attention: attention and the copies of its keys and values become one call of the CPU's kernel."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult
from fxquant.graphs import add_call, is_written_between, refresh_values, value_of
from fxquant.ops.attention import MASK_DTYPES
from fxquant.ops.checks import ACTIVATION_DTYPES
from fxquant.passes.around import keep_layout, sizes_of
from fxquant.passes.base import Pass
from fxquant.passes.sites import argument, torch_word, where

_ATTENTION = torch.ops.fxquant.attention.default
_WORD = "scaled_dot_product_attention"
_HEADS = 1  # the dimension


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Give attention to the kernel that reads keys and values once for all heads that share them.

    before:  k = reshape(expand(unsqueeze(k0, 2), [-1, -1, 4, -1, -1]), [1, 16, 128, 64])   v = …
             y = scaled_dot_product_attention(q, k, v, attn_mask=m)
    after:   y = attention(q, k0, v0, m, None, False)

    The copies may be spelled repeat_interleave too; enable_gqa is the kernel's own way. Of float32, bfloat16 and
    float16 with four dimensions, without dropout, on a CPU; whether anything else is quantized or not. The kernel
    computes in float32 and rounds once; its sums are in another order than torch's. It was not slower than torch's at
    any shape that was measured, so that there is no rule of sizes. What it gives is laid out as [batch, queries,
    heads, features], and copied where that would leave the graph, or where a `view` can't take it.
    """

    name = "fuse-attention"

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node in [n for n in gm.graph.nodes if torch_word(n) == _WORD]:
            if why := _why_not(node):
                result.declined.append(Declined(where(node), f"attention: {why}", node.name))
                continue
            _fuse(gm, node)
            result.changed += 1
        return result


def _operands(node: Node) -> tuple[Any, Any, Any, Any]:
    names = ("query", "key", "value", "attn_mask")
    query, key, value, mask = (argument(node, place, name) for place, name in enumerate(names))
    return query, key, value, mask


def _why_not(node: Node) -> str:
    """Why attention can't be given to the kernel; empty if it can."""
    query, key, value, mask = _operands(node)
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        return "it has dropout"
    values = [value_of(n) for n in (query, key, value) if isinstance(n, Node)]
    tensors = [t for t in values if isinstance(t, Tensor) and t.layout is torch.strided]
    if len(tensors) < 3:
        return "its operands are no dense tensors"
    if any(t.device.type != "cpu" for t in tensors):
        return f"it is on {tensors[0].device.type}"
    if any(t.dim() != 4 for t in tensors):
        return f"its operands have {', '.join(str(t.dim()) for t in tensors)} dimensions, not 4"
    if len({t.dtype for t in (*tensors, value_of(node))}) > 1 or tensors[0].dtype not in ACTIVATION_DTYPES:
        return f"it makes {value_of(node).dtype} of {', '.join(str(t.dtype) for t in tensors)}"
    if not isinstance(argument(node, 5, "is_causal", False), bool):
        return "whether it is causal is known only when it runs"
    if not isinstance(node.kwargs.get("scale"), (int, float, type(None))):
        return "its scale is known only when it runs"
    q, k, v = map(sizes_of, tensors)
    if not (q[0] == k[0] == v[0] and q[3] == k[3] and k[1:3] == v[1:3]):
        return f"its operands are {', '.join(str(list(t.shape)) for t in tensors)}"
    if not _groups(tensors[0].shape[_HEADS], tensors[1].shape[_HEADS]):
        return f"{q[1]} heads of the query are not known to be a multiple of {k[1]} of the key"
    return "" if mask is None else _why_no_mask(mask, k[2])


def _groups(heads: Any, key_heads: Any) -> bool:
    if isinstance(heads, int) and isinstance(key_heads, int):
        return key_heads > 0 and heads % key_heads == 0
    return str(heads) == str(key_heads)


def _why_no_mask(mask: Any, keys: str) -> str:
    value = value_of(mask) if isinstance(mask, Node) else None
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype not in MASK_DTYPES:
        return "its mask is no tensor of bools or floats on the CPU"
    if not 1 <= value.dim() <= 4 or sizes_of(value)[-1] != keys:
        return f"its mask is {list(value.shape)} for {keys} keys"
    return ""


def _fuse(gm: GraphModule, node: Node) -> None:
    query, key, value, mask = _operands(node)
    (key_source, key_copies), (value_source, value_copies) = (copied_from(n, node) for n in (key, value))
    if sizes_of(value_of(key_source))[_HEADS] != sizes_of(value_of(value_source))[_HEADS]:
        (key_source, key_copies), (value_source, value_copies) = (key, []), (value, [])
    args = (query, key_source, value_source, mask, node.kwargs.get("scale"), argument(node, 5, "is_causal", False))
    with gm.graph.inserting_before(node):
        made = add_call(gm.graph, _ATTENTION, args, like=node, made_by=FuseAttention.name)
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    for copy in dict.fromkeys((*key_copies, *value_copies)):
        if not copy.users:
            gm.graph.erase_node(copy)
    if refresh_values(gm, [made]):
        keep_layout(gm, made, FuseAttention.name)


def copied_from(node: Node, reader: Node) -> tuple[Node, list[Node]]:
    """The keys or values [batch, key_heads, n, width] that `node` repeats for each head of a group, and the nodes that
    do so, the last one first; `node` itself and none if it does not, or if its source is written to before `reader`.
    """
    for find in (_interleaved, _expanded):
        source, steps = find(node)
        if steps and not is_written_between(source, steps[-1], reader):
            return source, steps
    return node, []


Found = tuple[Node, list[Node]]


def _interleaved(node: Node) -> Found:
    if torch_word(node) != "repeat_interleave":
        return node, []
    x, repeats, dim = argument(node, 0, "input"), argument(node, 1, "repeats"), argument(node, 2, "dim")
    is_ours = isinstance(x, Node) and isinstance(repeats, int) and dim in (_HEADS, _HEADS - 4)
    return (x, [node]) if is_ours and value_of(x).dim() == 4 else (node, [])


def _expanded(node: Node) -> Found:
    """reshape(expand(x[:, :, None], [b, heads, group, n, width]), [b, heads * group, n, width])."""
    steps: list[Node] = []
    at = _through(node, steps, ("reshape", "view", "_unsafe_view", "flatten", "clone", "contiguous"), rank=5)
    if at is None or torch_word(at) != "expand":
        return node, []
    steps.append(at)
    at = _through_whole_slices(_first(at), steps)
    if at is None or not _adds_dimension(at):
        return node, []
    steps.append(at)
    source = _through_whole_slices(_first(at), steps)
    return (source, steps) if source is not None and _is_repeated(source, steps) else (node, [])


def _through_whole_slices(node: Node | None, steps: list[Node]) -> Node | None:
    """The first node behind slices that leave nothing out, as export spells x[:, :, None]."""
    while node is not None and torch_word(node) == "slice" and _sizes(node) == _sizes(_first(node)):
        steps.append(node)
        node = _first(node)
    return node


def _is_repeated(source: Node, steps: list[Node]) -> bool:
    """The shapes along the way are those of a repetition: nothing else was expanded or joined."""
    small, wide = value_of(source), next(value_of(n) for n in steps if torch_word(n) == "expand")
    whole = value_of(steps[0])
    if small.dim() != 4 or wide.dim() != 5 or whole.dim() != 4:
        return False
    b, heads, n, width = sizes_of(small)
    group = wide.shape[2]
    if not all(isinstance(size, int) for size in (small.shape[_HEADS], group, whole.shape[_HEADS])):
        return False
    same = sizes_of(wide) == [b, heads, str(group), n, width] and sizes_of(whole)[2:] == [n, width]
    return same and whole.shape[_HEADS] == small.shape[_HEADS] * group and sizes_of(whole)[0] == b


def _adds_dimension(node: Node) -> bool:
    """x[:, :, None], however it is written: nothing is left out, and the new dimension is the third."""
    word, source = torch_word(node), _first(node)
    if source is None or value_of(source).dim() != 4 or value_of(node).dim() != 5:
        return False
    if word == "unsqueeze":
        return argument(node, 1, "dim") in (2, -3)
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    index = node.args[1]
    if index[2:3] != (None,) and not (index[:1] == (Ellipsis,) and index[1:2] == (None,) and len(index) == 4):
        return False
    return index.count(None) == 1 and all(i in (None, Ellipsis) or i == slice(None) for i in index)


def _through(node: Node, steps: list[Node], words: tuple[str, ...], rank: int) -> Node | None:
    """The first node of that rank behind calls of these words, which are noted as steps."""
    at: Node | None = node
    while at is not None and torch_word(at) in words and value_of(at).dim() <= rank:
        steps.append(at)
        at = _first(at)
    return at


def _first(node: Node) -> Node | None:
    """The tensor that the call reads first."""
    x = argument(node, 0, "input")
    return x if isinstance(x, Node) and isinstance(value_of(x), Tensor) else None


def _sizes(node: Node | None) -> Any:
    return None if node is None else sizes_of(value_of(node))
