"""share-operands: what several of the CPU's kernels read beside their own operands is computed once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.annotation import PassResult
from fxquant.graphs import add_call, is_written_between, refresh_values, target_name, value_of
from fxquant.passes.base import Pass
from fxquant.passes.sites import argument, torch_word

_SHARED = torch.ops.fxquant.shared.default
_READ = {torch.ops.fxquant.attention.default: (3,), torch.ops.fxquant.rotary.default: (1, 2)}  # places of arguments
_CALLS = ("call_function", "call_method")
_VIEWS = ("unsqueeze", "expand", "expand_as", "getitem", "slice", "view", "reshape", "transpose", "permute", "squeeze")


@dataclass(frozen=True)
class ShareOperands(Pass):
    """Give the mask of all attentions, and the tables of all rotary embeddings, a place in memory.

    before:  y = attention(q, k, v, mask)            z = attention(q2, k2, v2, mask)
    after:   m = shared(mask)   y = attention(q, k, v, m)   z = attention(q2, k2, v2, m)

    Inductor would compute them anew for each kernel: it cannot look into one. Views of them are left where they are.
    What one kernel alone reads, an input of the graph, what is small or written to stays as it is.

    least: the fewest numbers that are shared.
    """

    name = "share-operands"
    least: int = 4096

    def run(self, gm: GraphModule) -> PassResult:
        result = PassResult()
        readers: defaultdict[Node, list[Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            for place in _READ.get(node.target, ()):
                if isinstance(operand := node.args[place], Node):
                    readers[_behind_views(operand)].append(node)
        end = next(iter(gm.graph.find_nodes(op="output")))
        for base, nodes in readers.items():
            if len(set(nodes)) < 2 or not self._pays(base) or is_written_between(base, base, end):
                continue
            with gm.graph.inserting_after(base):
                made = add_call(gm.graph, _SHARED, (base,), like=base, made_by=self.name)
            for user in [user for user in base.users if user is not made and user.op != "output"]:
                user.replace_input_with(base, made)
            refresh_values(gm, [made])
            result.changed += 1
        return result

    def _pays(self, base: Node) -> bool:
        """It is computed by Inductor, and not so small that this takes less time than another kernel's call."""
        size = value_of(base).numel()
        is_computed = base.op in _CALLS and not target_name(base).startswith("fxquant.")
        return is_computed and not (isinstance(size, int) and size < self.least)


def _behind_views(node: Node) -> Node:
    while node.op in _CALLS and torch_word(node) in _VIEWS:
        source = argument(node, 0, "input")
        if not isinstance(source, Node) or not isinstance(value_of(source), Tensor):
            break
        node = source
    return node
