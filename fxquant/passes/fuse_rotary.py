"""fuse-rotary: rotary position embedding becomes one call of the CPU's kernel."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.annotation import Declined, PassResult
from fxquant.graphs import add_call, is_written_between, refresh_values, value_of, written_by
from fxquant.ops.checks import ACTIVATION_DTYPES
from fxquant.ops.rotary import MOST_DIMS
from fxquant.passes.around import keep_layout, sizes_of
from fxquant.passes.base import Pass
from fxquant.passes.sites import argument, torch_word, where

_ROTARY = torch.ops.fxquant.rotary.default


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Give rotary position embedding of halves to a kernel.

    before:  x1, x2 = x[..., :32], x[..., 32:]
             y = x * cos + cat((-x2, x1), -1) * sin
    after:   y = rotary(x, cos, sin)

    Operands may stand in any order, and halves be spelled as indices, slice, narrow, chunk or split. Of float32,
    bfloat16 and float16, cos and sin of x's dtype, on a CPU. The kernel computes in float32 and rounds once. As the op
    is opaque to Inductor, cos and sin become tables that all heads of a call share. A result that leaves the graph, or
    that a `view` can't take, is copied where the kernel lays it out otherwise.

    least: the fewest numbers of x; one token's are left alone.
    """

    name = "fuse-rotary"
    least: int = 16384

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        for node in list(gm.graph.nodes):
            if torch_word(node) != "add" or (found := _find(node)) is None or self._is_small(found.x):
                continue
            if why := _why_not(node, found):
                result.declined.append(Declined(where(node), f"rotary embedding: {why}", node.name))
                continue
            _fuse(gm, node, found)
            result.changed += 1
        return result

    def _is_small(self, x: Node) -> bool:
        """Inductor rotates few numbers beside other work, in less time than another kernel's call takes."""
        size = value_of(x).numel()
        return isinstance(size, int) and size < self.least


@dataclass(frozen=True)
class _Found:
    x: Node
    cos: Node
    sin: Node
    steps: tuple[Node, ...]  # what computes it, without the sum, the last one first

    @property
    def operands(self) -> tuple[Node, Node, Node]:
        return self.x, self.cos, self.sin


def _find(total: Node) -> _Found | None:
    for straight, turned in permutations(_pair(total, "add"), 2):
        for joined, sin in permutations(_pair(turned, "mul"), 2):
            if (turn := _turned(joined)) is None:
                continue
            x, steps = turn
            factors = _pair(straight, "mul")
            if x in factors:
                cos = factors[1 - factors.index(x)]
                return _Found(x, cos, sin, (straight, turned, joined, *steps))
    return None


def _pair(node: Node, word: str) -> tuple[Node, ...]:
    """The two tensors of a sum or product that has no other arguments; none of anything else."""
    if torch_word(node) != word or len(node.args) != 2 or node.kwargs:
        return ()
    nodes = [n for n in node.args if isinstance(n, Node) and isinstance(value_of(n), Tensor)]
    return tuple(nodes) if len(nodes) == 2 else ()


def _turned(joined: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """x of cat((-x2, x1), -1), and the nodes that its halves are made by."""
    parts, rank = argument(joined, 0, "tensors"), value_of(joined).dim()
    if torch_word(joined) not in ("cat", "concat", "concatenate") or not isinstance(parts, list | tuple):
        return None
    if len(parts) != 2 or argument(joined, 1, "dim", 0) not in (-1, rank - 1):
        return None
    minus, first = parts
    if not isinstance(minus, Node) or torch_word(minus) not in ("neg", "negative") or not isinstance(first, Node):
        return None
    second = argument(minus, 0, "input")
    low, high = _half(first, 0), _half(second, 1) if isinstance(second, Node) else None
    if low is None or high is None or low[0] is not high[0]:
        return None
    return low[0], (minus, first, second, *low[1], *high[1])


def _half(node: Node, which: int) -> tuple[Node, tuple[Node, ...]] | None:
    """x and the call of which `node` takes a part, if `node` is the first (0) or second (1) half of x's features."""
    source = argument(node, 0, "input")
    if not isinstance(source, Node):
        return None
    if node.target is operator.getitem and not isinstance(value_of(source), Tensor):
        x = argument(source, 0, "input")
        parts = isinstance(x, Node) and _halves(source, value_of(x))
        return (x, (source,)) if parts and node.args[1] in (which, which - 2) else None
    value = value_of(source)
    if not isinstance(value, Tensor) or value.dim() == 0 or not isinstance(width := value.shape[-1], int) or width % 2:
        return None
    bounds = _bounds(node, value.dim(), width)
    return (source, ()) if bounds == (which * (width // 2), width // 2 * (which + 1)) else None


def _halves(call: Node, x: Any) -> bool:
    """Whether the call cuts the features of x in two halves."""
    if not isinstance(x, Tensor) or x.dim() == 0 or not isinstance(width := x.shape[-1], int) or width % 2:
        return False
    word, how = torch_word(call), argument(call, 1, "split_size" if "split" in str(call.target) else "chunks")
    if argument(call, 2, "dim", 0) not in (-1, x.dim() - 1):
        return False
    if word in ("chunk", "tensor_split"):
        return how == 2
    return word in ("split", "split_with_sizes") and how in (width // 2, [width // 2] * 2, (width // 2,) * 2)


def _bounds(node: Node, rank: int, width: int) -> tuple[Any, Any] | None:
    """The features that a node leaves of its tensor, where it leaves all of the other dimensions."""
    word, last = torch_word(node), (-1, rank - 1)
    if word == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        *leading, part = index
        whole = all(i is Ellipsis or i == slice(None) for i in leading) and sum(i is Ellipsis for i in leading) <= 1
        reaches = Ellipsis in leading or len(index) == rank
        if not whole or not reaches or not isinstance(part, slice) or part.step not in (None, 1):
            return None
        return _within(part.start, part.stop, width)
    if argument(node, 1, "dim", 0) not in last:
        return None
    if word == "narrow":
        start, length = argument(node, 2, "start"), argument(node, 3, "length")
        return (start, start + length) if isinstance(start, int) and isinstance(length, int) else None
    if word == "slice" and argument(node, 4, "step", 1) == 1:
        return _within(argument(node, 2, "start"), argument(node, 3, "end"), width)
    return None


def _within(start: Any, stop: Any, width: int) -> tuple[int, int] | None:
    if not all(bound is None or isinstance(bound, int) for bound in (start, stop)):
        return None
    return slice(start, stop).indices(width)[:2]


def _why_not(total: Node, found: _Found) -> str:
    """Why the kernel can't be given it; empty if it can."""
    values = [value_of(n) for n in found.operands]
    x, dtypes = values[0], {t.dtype for t in (*values, value_of(total))}
    if any(t.layout is not torch.strided for t in values):
        return "its operands are no dense tensors"
    if any(t.device.type != "cpu" for t in values):
        return f"it is on {x.device.type}"
    if len(dtypes) > 1 or x.dtype not in ACTIVATION_DTYPES:
        return f"it makes {value_of(total).dtype} of {', '.join(str(t.dtype) for t in values)}"
    if x.dim() > MOST_DIMS or any(not 1 <= t.dim() <= x.dim() for t in values):
        return f"its operands have {', '.join(str(t.dim()) for t in values)} dimensions"
    if any(not _broadcasts(t, x) for t in values[1:]):
        return f"its operands are {', '.join(str(list(t.shape)) for t in values)}"
    if str(x.stride(-1)) != "1":
        return "the features of x do not lie side by side"
    first = min(found.steps)
    if any(is_written_between(n, first, total) for n in found.operands) or any(map(written_by, found.steps)):
        return "an operand is written to meanwhile"
    return ""


def _broadcasts(t: Tensor, x: Tensor) -> bool:
    sizes, wanted = sizes_of(t), sizes_of(x)[x.dim() - t.dim() :]
    return sizes[-1] == wanted[-1] and all(a in (b, "1") for a, b in zip(sizes[:-1], wanted[:-1], strict=True))


def _fuse(gm: GraphModule, total: Node, found: _Found) -> None:
    with gm.graph.inserting_before(total):
        made = add_call(gm.graph, _ROTARY, found.operands, like=total, made_by=FuseRotary.name)
    total.replace_all_uses_with(made)
    gm.graph.erase_node(total)
    for step in sorted(set(found.steps), reverse=True):
        if not step.users:
            gm.graph.erase_node(step)
    if refresh_values(gm, [made]):
        keep_layout(gm, made, FuseRotary.name)
