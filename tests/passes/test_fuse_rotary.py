"""fuse-rotary: rotary embedding of halves goes to the kernel, however it is spelled, or stays with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.annotation import PassResult
from fxquant.passes import FuseRotary, run_passes
from tests.passes.helpers import captured_of, check_pass, nodes_of, run, within

ROTARY = torch.ops.fxquant.rotary.default
X, COS, SIN = (torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3))
COS, SIN = COS[:1, :1], SIN[:1, :1]
CLOSE = within(2.0**-22)  # |products| <= 1: three roundings of values up to 2 on either side

Forward = Callable[[Tensor, Tensor, Tensor], Any]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :4], x[..., 4:]


def turned(x: Tensor) -> Tensor:
    a, b = halves(x)
    return torch.cat((-b, a), dim=-1)


def with_halves(cut: Callable[[Tensor], Any]) -> Forward:
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = cut(x)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    return forward


SPELLINGS: dict[str, Forward] = {
    "indices": with_halves(halves),
    "all indices": with_halves(lambda x: (x[:, :, :, :4], x[:, :, :, 4:8])),
    "negative bounds": with_halves(lambda x: (x[..., :-4], x[..., -4:])),
    "chunk": with_halves(lambda x: x.chunk(2, -1)),
    "chunk by name": with_halves(lambda x: torch.chunk(x, chunks=2, dim=3)),
    "split": with_halves(lambda x: x.split(4, dim=-1)),
    "split of sizes": with_halves(lambda x: torch.split(x, [4, 4], dim=-1)),
    "tensor_split": with_halves(lambda x: torch.tensor_split(x, 2, dim=-1)),
    "narrow": with_halves(lambda x: (x.narrow(-1, 0, 4), x.narrow(-1, 4, 4))),
    "order of factors": lambda x, cos, sin: cos * x + sin * turned(x),
    "order of terms": lambda x, cos, sin: turned(x) * sin + x * cos,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fuses(spelling: str) -> None:
    captured, inputs = captured_of(SPELLINGS[spelling], X, COS, SIN)
    result = check_pass(FuseRotary(least=0), captured, *inputs, changed=1, compare=CLOSE)
    assert result.declined == []
    assert len(nodes_of(captured.gm, ROTARY)) == 1
    assert not captured.gm.graph.find_nodes(op="call_function", target=torch.cat)


def test_fuses_what_lies_transposed_in_a_joined_product() -> None:
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x[..., :24].view(2, 5, 3, 8).transpose(1, 2)
        return heads * cos + turned(heads) * sin

    captured, inputs = captured_of(forward, X.reshape(2, 5, 24).repeat(1, 1, 2), COS, SIN)
    check_pass(FuseRotary(least=0), captured, *inputs, changed=1, compare=CLOSE)


def left(forward: Forward, *inputs: Tensor) -> PassResult:
    captured, ordered = captured_of(forward, *inputs)
    want = run(captured.gm, ordered)
    result = run_passes(captured.gm, [FuseRotary(least=0)])["fuse-rotary"]
    assert result.changed == 0
    torch.testing.assert_close(run(captured.gm, ordered), want, rtol=0, atol=0)
    return result


LIKE_IT: dict[str, Forward] = {
    "halves in their order": lambda x, cos, sin: x * cos + torch.cat((halves(x)[0], -halves(x)[1]), -1) * sin,
    "the other half negated": lambda x, cos, sin: x * cos + torch.cat((-halves(x)[0], halves(x)[1]), -1) * sin,
    "nothing negated": lambda x, cos, sin: x * cos + torch.cat(halves(x)[::-1], -1) * sin,
    "unequal parts": with_halves(lambda x: (x[..., :3], x[..., 3:])),
    "another tensor": lambda x, cos, sin: (x + 1) * cos + turned(x) * sin,
    "alpha": lambda x, cos, sin: torch.add(x * cos, turned(x) * sin, alpha=2),
}


@pytest.mark.parametrize("name", LIKE_IT)
def test_leaves_what_only_looks_like_it(name: str) -> None:
    assert left(LIKE_IT[name], X, COS, SIN).declined == []


def test_declines_other_dtypes() -> None:
    (no,) = left(SPELLINGS["chunk"], X.bfloat16(), COS, SIN).declined
    assert no.reason.startswith("rotary embedding: it makes torch.float32 of torch.bfloat16, torch.float32")
    (no,) = left(SPELLINGS["chunk"], X.double(), COS.double(), SIN.double()).declined
    assert no.reason.startswith("rotary embedding: it makes torch.float64")


def test_declines_tables_that_widen_x() -> None:
    (no,) = left(SPELLINGS["chunk"], X[:1], COS.repeat(4, 1, 1, 1), SIN).declined
    assert no.reason.startswith("rotary embedding: its operands are [1, 3, 5, 8], [4, 1, 5, 8]")


def test_declines_operands_that_change_meanwhile() -> None:
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos = cos.clone()
        straight = x * cos
        cos.add_(1)
        return straight + turned(x) * sin

    (no,) = left(forward, X, COS, SIN).declined
    assert no.reason == "rotary embedding: an operand is written to meanwhile"
