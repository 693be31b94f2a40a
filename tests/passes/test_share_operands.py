"""share-operands: masks and tables that several kernels read have one place in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from fxquant import cpu_kernels
from fxquant.passes import FuseAttention, FuseRotary, ShareOperands, run_passes
from tests.passes.helpers import captured_of, check_pass, nodes_of

ATTENTION, ROTARY, SHARED = (getattr(torch.ops.fxquant, name).default for name in ("attention", "rotary", "shared"))
X = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
ANGLES = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(1))
KEPT = torch.ones(2, 5, dtype=torch.bool)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin


def layers(x: Tensor, angles: Tensor, kept: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    mask = torch.ones(5, 5, dtype=torch.bool).tril() & kept[:, None, None, :]
    for _ in range(2):
        q, k = (turned(part, cos.unsqueeze(1), sin.unsqueeze(1)) for part in (x, x + 1))
        x = F.scaled_dot_product_attention(q, k, x, attn_mask=mask[:, :, :, :5])
    return x


def shares(forward: Callable[..., Tensor], count: int, least: int = 0) -> GraphModule:
    captured, inputs = captured_of(forward, X, ANGLES, KEPT)
    run_passes(captured.gm, [FuseRotary(least=0), FuseAttention()])
    check_pass(ShareOperands(least=least), captured, *inputs, changed=count)
    assert len(nodes_of(captured.gm, SHARED)) == count
    return captured.gm


def test_what_all_layers_read_is_computed_once() -> None:
    gm = shares(layers, 3)
    read: list[Any] = [node.args[3] for node in nodes_of(gm, ATTENTION)]
    read += [table for node in nodes_of(gm, ROTARY) for table in node.args[1:3]]
    made = set(nodes_of(gm, SHARED))
    assert len(read) == 2 + 8
    assert all({node, *node.all_input_nodes} & made for node in read)


def test_small_ones_are_left() -> None:
    shares(layers, 1, least=45)  # the mask has 50 numbers, each table 40


@pytest.mark.parametrize("written", [False, True])
def test_what_is_written_to_is_left(written: bool) -> None:
    def forward(x: Tensor, angles: Tensor, kept: Tensor) -> Tensor:
        mask = kept[:, None, None, :] & angles[0, 0, 0].gt(-1)
        first = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        if written:
            mask.logical_not_()
        return F.scaled_dot_product_attention(first, x, x, attn_mask=mask)

    shares(forward, int(not written))


def test_what_one_kernel_reads_and_inputs_are_left() -> None:
    def forward(x: Tensor, angles: Tensor, kept: Tensor) -> Tensor:
        mask = kept[:, None, None, :]
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return turned(x, angles.cos(), angles.sin())

    shares(forward, 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.int64])
def test_the_op_copies(dtype: torch.dtype) -> None:
    cpu_kernels.load()
    for x in (X.to(dtype), X.to(dtype).transpose(1, 2), X.to(dtype)[:0]):
        found = torch.ops.fxquant.shared(x)
        assert torch.equal(found, x)
        assert found.stride() == torch.empty_like(x).stride()
        assert found.data_ptr() != x.data_ptr() or not x.numel()
    torch.library.opcheck(torch.ops.fxquant.shared.default, (X,))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
def test_compiled_for_sizes_that_are_not_known() -> None:
    def forward(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        for _ in range(2):
            q, k = (turned(part, cos.unsqueeze(1), sin.unsqueeze(1)) for part in (x, x + 1))
            x = F.scaled_dot_product_attention(q, k, x, attn_mask=mask)
        return x

    compiled = torch.compile(forward, backend="fxquant", dynamic=True, fullgraph=True)
    for length in (5, 7, 160):
        x, angles = torch.randn(2, 3, length, 8), torch.rand(1, length, 8)
        torch.testing.assert_close(compiled(x, angles), forward(x, angles), rtol=1e-5, atol=1e-5)
