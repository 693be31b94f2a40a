"""Embeddings on their way through the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant import verify
from fxquant.annotation import note_of
from fxquant.folding import folded_constants
from fxquant.passes import Annotate, FoldWeights, InsertQdq, ShareQuantize, run_passes
from fxquant.products import EMBEDDING
from fxquant.runner import Deciding
from fxquant.spec import QuantConfig
from tests.helpers import capture
from tests.passes.helpers import assert_same_graph, check_pass, nodes_of, quantized_weight, staged

fx = torch.ops.fxquant
IDS = torch.tensor([[1, 0, 7, 3], [9, 9, 2, 0]])
INT8 = QuantConfig("int8dq", embeddings="int8")


class Tied(nn.Module):
    """A table of ten rows, and a head that may be tied to it."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(10, 16, padding_idx=0)
        self.head = nn.Linear(16, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(ids)))


def anything(got: Any, wanted: Any) -> None:
    """For passes that change the numbers."""


@pytest.mark.parametrize("spec", ["int8/channel", "int4/group32/affine", "nvfp4", "float8_e4m3fn/tensor"])
def test_the_table_stands_behind_codes(spec: str) -> None:
    class After(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(EMBEDDING(quantized_weight(self.embed.weight, text), ids, 0)))

    config = QuantConfig("int8dq", embeddings=spec, rules={"head": None})
    captured = staged(Tied(), IDS, config=config, before="insert-qdq")
    (site,) = nodes_of(captured.gm, EMBEDDING)
    wanted = note_of(site).spec
    assert wanted is not None
    text = str(wanted.weights)
    check_pass(InsertQdq(), captured, IDS, changed=1, compare=anything)
    assert_same_graph(captured.gm, capture(After(), IDS).gm)
    verify.quantized(captured.gm)


def test_embeddings_stay_float_unless_asked() -> None:
    captured = staged(Tied(), IDS)
    (site,) = nodes_of(captured.gm, EMBEDDING)
    assert note_of(site).spec is None
    assert note_of(site).reason == "embeddings stay float by default; give embeddings= or a rule"


def test_a_rule_gives_an_embedding_its_weight_side() -> None:
    captured = staged(Tied(), IDS, config=QuantConfig(rules={"embed": "int8dq"}))
    (site,) = nodes_of(captured.gm, EMBEDDING)
    assert str(note_of(site).spec) == "w=int8/channel"
    verify.quantized(captured.gm)


def test_a_head_tied_to_its_table_shares_the_codes() -> None:
    captured = staged(Tied(tied=True), IDS, config=INT8, before="share-quantize")
    check_pass(ShareQuantize(), captured, IDS, changed=1)
    (quantize,) = nodes_of(captured.gm, fx.quantize_weight.default)
    assert note_of(quantize).paths == ("embed", "head")
    check_pass(FoldWeights(), captured, IDS, changed=1)
    (constant,) = set(folded_constants(captured.gm).values())
    assert constant.sources == ("embed_weight",)
    verify.quantized(captured.gm)


def test_a_head_tied_to_a_table_of_another_format_has_codes_of_its_own() -> None:
    config = QuantConfig("int8dq", embeddings="int4/group8/affine")
    captured = staged(Tied(tied=True), IDS, config=config, before="fold-weights")
    check_pass(FoldWeights(), captured, IDS, changed=2)
    one, other = set(folded_constants(captured.gm).values())
    assert one.sources == other.sources == ("embed_weight",)


def test_a_table_of_constant_indices_is_quantized_unless_it_makes_a_weight() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = nn.Embedding(10, 16), nn.Embedding(10, 16)
            self.register_buffer("ids", torch.arange(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x + self.table(self.ids), self.other(self.ids))

    x = torch.rand(4, 16)
    captured = capture(Positions(), x)
    config = QuantConfig("int8wo", embeddings="int8")
    (declined,) = run_passes(captured.gm, [Annotate(Deciding(config))])["annotate"].declined
    assert declined.where == "other"
    assert declined.reason.startswith("its result is the weight of another product")
    captured = staged(Positions(), x, config=config, before="fold-weights")
    check_pass(FoldWeights(), captured, x, changed=2)
    counts = sorted(len(c.sources) for c in set(folded_constants(captured.gm).values()))
    assert counts == [1, 2]  # the table; the other with the indices that make it a weight
