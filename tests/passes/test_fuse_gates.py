"""fuse-gates: the gated product of a linear's halves goes into its kernel, or stays with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.annotation import note_of
from fxquant.dump import text
from fxquant.graphs import CapturedGraph, value_of
from fxquant.lowering import select_kernels
from fxquant.passes import FuseEpilogues, FuseGates, FusePrologues
from fxquant.passes.around import operand_of
from tests.lowering.helpers import CPU
from tests.passes.helpers import Forward, K, Linears, X, check_pass, nodes_of, staged, within
from tests.passes.test_fuse_prologues import GATES as FUNCTIONS
from tests.passes.test_fuse_prologues import OPS

fx = torch.ops.fxquant
HALF = 64
TWO = (HALF, HALF, K)  # gate, up and what reads their product
ONE = (2 * HALF, HALF, K)  # both as one linear
Halves = Callable[[Tensor], Any]


def lowered(forward: Forward, widths: tuple[int, ...], config: Any = "int8dq", **options: Any) -> CapturedGraph:
    model = Linears(forward, widths)
    captured = staged(model, X, config=config, **options)
    select_kernels(captured.gm, CPU)
    return captured


def words_of(captured: CapturedGraph) -> set[str]:
    return {n.name.split("_")[0] for n in captured.gm.graph.nodes}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("config", OPS)
@pytest.mark.parametrize("swapped", [False, True])
def test_siblings_that_were_joined(name: str, config: str, swapped: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate, up = FUNCTIONS[name](m.a(x)), m.b(x)
        return up * gate if swapped else gate * up

    captured = lowered(forward, TWO, config)
    result = check_pass(FuseGates(), captured, X, changed=1, compare=within(1e-6))
    assert result.declined == []
    (made,) = nodes_of(captured.gm, OPS[config])
    half = f"{name.removesuffix('_mul')}_first"
    assert operand_of(made, "activation") == half
    assert note_of(made).kernel.endswith(f" +{half}")
    assert note_of(made).made_by[-1] == "fuse-gates"
    assert list(value_of(made).shape) == [5, HALF]
    assert not {"mul", "silu", "gelu", "relu", "split", "getitem"} & words_of(captured)


PARTS: dict[str, Halves] = {
    "chunk": lambda y: y.chunk(2, dim=-1),
    "split": lambda y: torch.split(y, HALF, -1),
    "split_with_sizes": lambda y: y.split([HALF, HALF], dim=1),
    "slices": lambda y: (y[..., :HALF], y[:, HALF:]),
    "narrow": lambda y: (y.narrow(1, 0, HALF), y.narrow(-1, HALF, HALF)),
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("half", ["first", "second"])
def test_halves_however_the_model_takes_them(parts: str, half: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = PARTS[parts](m.a(x))
        return F.gelu(first) * second if half == "first" else first * F.gelu(second)

    captured = lowered(forward, ONE)
    check_pass(FuseGates(), captured, X, changed=1, compare=within(1e-6))
    (made,) = nodes_of(captured.gm, fx.int8_linear_dynamic.default)
    assert operand_of(made, "activation") == f"gelu_{half}"
    assert not {"chunk", "split", "getitem", "narrow", "gelu", "mul"} & words_of(captured)


def test_the_three_passes_together() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.silu(m.a(x)) * m.b(x)
        return F.relu(m.c(x.cos())) + h.sum(-1, keepdim=True)

    captured = lowered(forward, TWO)
    check_pass(FuseGates(), captured, X, changed=1, compare=within(1e-6))
    assert check_pass(FusePrologues(), captured, X, changed=0).declined == []
    check_pass(FuseEpilogues(), captured, X, changed=1, compare=within(1e-6))  # relu


def test_a_residual_of_the_product() -> None:
    captured = lowered(lambda m, x: F.silu(m.a(x)) * m.b(x) + x.repeat(1, HALF // K), TWO)
    check_pass(FuseGates(), captured, X, changed=1, compare=within(1e-6))
    check_pass(FuseEpilogues(), captured, X, changed=1, compare=within(1e-6))
    (made,) = nodes_of(captured.gm, fx.int8_linear_dynamic.default)
    assert note_of(made).kernel == "int8_linear_dynamic +silu_first +residual"


def test_dynamic_rows() -> None:
    captured = lowered(lambda m, x: F.silu(m.a(x)) * m.b(x), TWO, dynamic=True)
    assert FuseGates().run(captured.gm).changed == 1
    assert "int8_linear_dynamic: f32[s" in text(captured.gm)
    captured = lowered(lambda m, x: torch.mul(*PARTS["slices"](F.relu(m.a(x)))), ONE, dynamic=True)
    assert FuseGates().run(captured.gm).changed == 0  # both halves are activated


def refused(forward: Forward, widths: tuple[int, ...], words: str) -> None:
    captured = lowered(forward, widths)
    (declined,) = check_pass(FuseGates(), captured, X, changed=0).declined
    assert declined.reason == words


def test_a_part_with_other_readers() -> None:
    def kept(m: Any, x: Tensor) -> Tensor:
        gate, up = m.a(x), m.b(x)
        return F.silu(gate) * up + up

    refused(kept, TWO, "silu_first: a part of it is read by add too")

    def whole(m: Any, x: Tensor) -> Tensor:
        both = m.a(x)
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up + both.sum()

    refused(whole, ONE, "silu_first: a part of it is read by sum too")

    def activated(m: Any, x: Tensor) -> Tensor:
        gate = F.silu(m.a(x))
        return gate * m.b(x) - gate

    refused(activated, TWO, "silu_first: a part of it is read by sub too")


def test_what_kernels_do_not_compute() -> None:
    def gated(m: Any, x: Tensor) -> Tensor:
        return F.silu(m.a(x)) * m.b(x)

    words = "silu_first: halves of 48 columns, the kernels want a multiple of 64"
    refused(gated, (48, 48, K), words)

    def in_place(m: Any, x: Tensor) -> Tensor:
        gate, up = m.a(x).chunk(2, -1)
        return F.silu(gate, inplace=True) * up

    refused(in_place, ONE, "silu_first: the model computes it in place")

    def written(m: Any, x: Tensor) -> Tensor:
        gate, up = m.a(x).chunk(2, -1)
        return F.silu(gate).mul_(up)

    refused(written, ONE, "silu_first: the model computes it in place")


NO_GATES: dict[str, Any] = {
    "three parts": lambda m, x: torch.mul(F.silu(m.a(x)[:, :HALF]), m.a(x)[:, HALF // 2 : HALF // 2 + HALF]),
    "one half twice": lambda m, x: torch.mul(F.silu(h := m.a(x)[:, :HALF]), h),
    "no activation": lambda m, x: torch.mul(*m.a(x).chunk(2, -1)),
    "transposed": lambda m, x: torch.mul(F.silu(m.a(x)[:, ::2]), m.a(x)[:, 1::2]),
    "rows": lambda m, x: torch.mul(F.silu(m.a(x)[:2]), m.a(x)[2:4]),
    "another linear": lambda m, x: F.silu(m.a(x)[:, :HALF]) * m.b(x.cos()),
    "a number": lambda m, x: F.silu(m.a(x)[:, :HALF]) * 2,
}


@pytest.mark.parametrize("name", NO_GATES)
def test_what_is_no_gate_is_left(name: str) -> None:
    captured = lowered(NO_GATES[name], ONE)
    assert check_pass(FuseGates(), captured, X, changed=0).declined == []
