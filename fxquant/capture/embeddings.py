"""Every look-up in a constant table becomes `aten.embedding`.

before:  embedding(indices, @w, 9, None, 2.0, False, False)        (torch.nn.functional's order)
after:   embedding(@w, indices, 9)

The padding index and what follows it speak of gradients only; they are kept as they are.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxquant.capture.editor import Editor, bound_arguments
from fxquant.graphs import value_of
from fxquant.products import EMBEDDING
from fxquant.verify import PRODUCTS

_DEFAULTS = [-1, False, False]


def embedding(editor: Editor, node: Node, usable: set[Node]) -> str:
    """Rewrite one look-up; returns why it stays, or nothing. One with max_norm writes to its table: see `usable`."""
    if node.target is torch.nn.functional.embedding:
        indices, weight, padding, max_norm, _, *rest = bound_arguments(
            node, "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
        )
    else:
        weight, indices, padding, *rest = bound_arguments(
            node, "weight", "indices|input", "padding_idx", "scale_grad_by_freq", "sparse"
        )
        max_norm = None
    if weight not in usable or max_norm is not None or not isinstance(indices, Node):
        return PRODUCTS["embedding"]
    table = value_of(weight)
    if table.dim() != 2 or not table.dtype.is_floating_point:
        return f"a table of {table.dim()} dimensions and dtype {table.dtype}"
    if padding is None:
        padding = -1
    elif padding < 0 and node.target is torch.nn.functional.embedding:
        padding += int(table.shape[0])
    tail = [padding, *(bool(flag) for flag in rest)]
    while tail and tail[-1] == _DEFAULTS[len(tail) - 1]:
        tail.pop()
    editor.turn_into(node, EMBEDDING, (weight, indices, *tail), weight)
    return ""
