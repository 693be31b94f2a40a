"""The rule for embeddings."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.lowering.rule import PACK_ROWS, Rule, add, layout, no_kernel
from fxquant.lowering.site import QuantizedSite
from fxquant.target import Target


class GatherRows(Rule):
    """Only the rows that are looked up are decoded.

    before:  embedding(dequantize(@codes, @scale), indices)
    after:   embedding_dequantize(indices, pack_rows(@codes), @scale)
    """

    kind = "embedding"
    kernel = "embedding_dequantize"

    def why_not(self, site: QuantizedSite, target: Target) -> str:
        return no_kernel(site, target)

    def build(self, gm: GraphModule, site: QuantizedSite, target: Target) -> Node:
        weight, spec = site.weight, str(site.weight.spec)
        rows = layout(gm, weight.codes, PACK_ROWS, spec)
        tail = (weight.scale, weight.zero_point, weight.tensor_scale, weight.in_features, spec, site.dtype)
        return add(gm, site, torch.ops.fxquant.embedding_dequantize.default, site.x, rows, *tail)
