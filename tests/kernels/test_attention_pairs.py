"""Attention of bfloat16 on the CPU, where pairs of it may be multiplied at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.attention_problems import Operands, assert_right, attention64, generator, operands
from tests.kernels.cpu_helpers import assert_equal, pairs

attention = torch.ops.fxquant.attention
pytestmark = pytest.mark.usefixtures("kernels")
MIDDLE = (2, 4, 2, 37, 150, 24, 40)


def test_bfloat16_products_are_exact(isa: int) -> None:
    """Scores that are integers in steps of 128: the largest has all the weight."""
    o = operands(MIDDLE, torch.bfloat16)
    query, key = (torch.randint(-8, 9, x.shape, generator=generator(i)).bfloat16() for i, x in enumerate(o.all[:2]))
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT
    best = scores.topk(2, -1)
    alone = best.values[..., 0] > best.values[..., 1]
    want = o.value.repeat_interleave(2, 1).gather(2, best.indices[..., :1].expand(-1, -1, -1, 40))
    assert alone.float().mean() > 0.5
    assert_equal(attention(query, key, o.value, None, 128.0, isa=isa)[alone], want[alone])


def test_subnormal_bfloat16_counts_as_itself_or_as_nothing(isa: int) -> None:
    o = operands(MIDDLE, torch.bfloat16)
    o = Operands(o.query, o.key, o.value * 2.0**-126)
    assert_right(attention(*o.all, isa=isa), o, paired=pairs(isa, torch.bfloat16))


@pytest.mark.parametrize("factor", [0.3, 1.0, 8.0])
def test_bfloat16_is_no_further_off_than_in_torch(isa: int, factor: float) -> None:
    o = operands((1, 4, 2, 256, 256, 64, 64), torch.bfloat16)
    o = Operands(o.query * factor, o.key, o.value)
    want, _ = attention64(o)
    ours, theirs = (
        (got.double() - want).square().mean()
        for got in (attention(*o.all, isa=isa), scaled_dot_product_attention(*o.all, enable_gqa=True))
    )
    assert ours <= theirs
