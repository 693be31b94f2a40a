"""fuse-norms: a norm before codes goes into the kernel that makes them, or stays with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graphs import CapturedGraph
from fxquant.lowering import select_kernels
from fxquant.passes import FuseNorms
from fxquant.spec import QuantConfig
from fxquant.target import Target
from tests.passes.helpers import K, Linears, X, check_pass, nodes_of, staged, within

fx = torch.ops.fxquant
SM90 = Target("cuda", arch="sm90")
WEIGHT = torch.rand(K, generator=torch.Generator().manual_seed(2)) + 0.5
# A code of int8 may differ by one: 16 products with a step of 2 * 4 / 127.
ONE_CODE = 0.1


def taken(problem: Any) -> str:
    return ""


class Normed(Linears):
    """A norm over K features before the linears."""

    def __init__(self, norm: Any, forward: Any = None, **options: Any) -> None:
        super().__init__(forward or (lambda m, x: m.a(m.normed(m, x))), **options)
        self.weight, self.bias = nn.Parameter(WEIGHT.clone()), nn.Parameter(WEIGHT - 1)
        self.normed = norm


def lowered(norm: Any, x: Tensor = X, *, forward: Any = None, config: Any = "int8dq", **options: Any) -> CapturedGraph:
    captured = staged(Normed(norm, forward).to(x.dtype), x, config=config, **options)
    select_kernels(captured.gm, SM90)
    return captured


def llama(m: Any, h: Tensor) -> Tensor:
    """As transformers spells it."""
    dtype = h.dtype
    h = h.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + 1e-6)
    return m.weight * h.to(dtype)


NORMS: dict[str, tuple[Any, str]] = {
    "rms_norm": (lambda m, x: F.rms_norm(x, (K,), m.weight, 1e-6), "rmsnorm"),
    "rms_norm without eps": (lambda m, x: F.rms_norm(x, (K,), m.weight), "rmsnorm"),
    "rms_norm without weight": (lambda m, x: F.rms_norm(x, (K,), eps=1e-6), "rmsnorm"),
    "layer_norm": (lambda m, x: F.layer_norm(x, (K,), m.weight, m.bias, 1e-6), "layernorm"),
    "layer_norm without bias": (lambda m, x: F.layer_norm(x, (K,), m.weight), "layernorm"),
    "layer_norm without either": (lambda m, x: F.layer_norm(x, (K,)), "layernorm"),
    "aten.layer_norm": (lambda m, x: torch.ops.aten.layer_norm.default(x, [K], m.weight, m.bias), "layernorm"),
    "rms_norm by names": (lambda m, x: F.rms_norm(x, normalized_shape=(K,), weight=m.weight, eps=1e-6), "rmsnorm"),
    "layer_norm by names": (lambda m, x: F.layer_norm(input=x, normalized_shape=(K,), bias=m.bias), "layernorm"),
    "llama": (llama, "rmsnorm"),
    "in its own dtype": (lambda m, x: x * torch.rsqrt(torch.mean(x * x, -1, True) + 1e-6) * m.weight, "rmsnorm"),
    "squared": (lambda m, x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * m.weight, "rmsnorm"),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm(name: str, dtype: torch.dtype) -> None:
    norm, kind = NORMS[name]
    captured = lowered(norm, X.to(dtype))
    result = check_pass(FuseNorms(taken), captured, X.to(dtype), changed=1, compare=within(ONE_CODE))
    assert result.declined == []
    (made,) = nodes_of(captured.gm, fx.norm_quantize.default)
    assert (made.args[1], made.args[5]) == (kind, "int8/token")
    assert not nodes_of(captured.gm, fx.quantize_dynamic.default)
    assert "rsqrt" not in captured.gm.code


def test_siblings_share_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        n = m.normed(m, x)
        return m.a(n) * m.b(n)

    for config in ("int8dq", QuantConfig("int8dq", fuse=False)):
        captured = lowered(llama, forward=forward, config=config)
        check_pass(FuseNorms(taken), captured, X, changed=1, compare=within(ONE_CODE))


def refused(norm: Any, words: str, *, forward: Any = None, step: FuseNorms | None = None, x: Tensor = X) -> None:
    captured = lowered(norm, x, forward=forward)
    result = check_pass(step or FuseNorms(taken), captured, x, changed=0)
    (declined,) = result.declined
    assert declined.reason == words
    assert declined.where.startswith("test_fuse_norms.py:")


def test_a_result_that_is_read_elsewhere() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        n = m.normed(m, x)
        return m.a(n).sum() + n

    refused(NORMS["rms_norm"][0], "rmsnorm: its result is read by add too", forward=forward)


def test_a_float_sibling_reads_the_result() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        n = m.normed(m, x)
        return m.a(n) + m.b(n)

    captured = staged(Normed(NORMS["layer_norm"][0], forward), X, config=QuantConfig("int8dq", rules={"b": None}))
    select_kernels(captured.gm, SM90)
    (declined,) = check_pass(FuseNorms(taken), captured, X, changed=0).declined
    assert declined.reason == "layernorm: its result is read by aten.linear too"


def test_what_is_computed_on_the_way_is_read_elsewhere() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        variance = x.pow(2).mean(-1, keepdim=True)
        return m.a(m.weight * (x * torch.rsqrt(variance + 1e-6))), variance

    refused(None, "rmsnorm: what it computes on its way is read elsewhere", forward=forward)


def test_a_norm_that_changes_the_dtype() -> None:
    def norm(m: Any, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        return m.weight.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    captured = staged(Normed(norm, lambda m, x: m.a(norm(m, x.half()))), X)
    select_kernels(captured.gm, SM90)
    (declined,) = check_pass(FuseNorms(taken), captured, X, changed=0).declined
    assert declined.reason == "rmsnorm: it makes torch.float32 of torch.float16"


def test_an_input_that_is_written_to() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = torch.cos(x)
        n = m.normed(m, h)
        h.mul_(2)
        return m.a(n) + h.sum()

    words = "rmsnorm: the model writes to its input before the result is quantized"
    refused(NORMS["rms_norm"][0], words, forward=forward)


def test_what_no_kernel_takes() -> None:
    step = FuseNorms(lambda problem: f"no kernel for {problem}")
    words = "rmsnorm: no kernel for quantize 0×0×16 int8/token rmsnorm -> float32"
    refused(NORMS["rms_norm"][0], words, step=step)


@pytest.mark.parametrize(
    "norm",
    [
        lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)),
        lambda m, x: m.weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.weight * (x * torch.rsqrt(x.cos().pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.weight * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.weight * x,
    ],
)
def test_what_only_looks_like_a_norm(norm: Any) -> None:
    assert check_pass(FuseNorms(taken), lowered(norm), X, changed=0).declined == []


def test_a_norm_over_two_axes_is_none() -> None:
    x = X.view(5, 2, 8)
    model = nn.Sequential(nn.LayerNorm([2, 8]), nn.Linear(8, 4))
    captured = staged(model, x)
    select_kernels(captured.gm, SM90)
    assert check_pass(FuseNorms(taken), captured, x, changed=0).declined == []


@pytest.mark.parametrize("scaled", [lambda m, x: x * x.shape[0], lambda m, x: x.shape[0] * x])
def test_a_product_with_a_symbolic_size_is_none(scaled: Any) -> None:
    assert FuseNorms(taken).run(lowered(scaled, dynamic=True).gm).changed == 0


def test_a_function_of_the_users_is_none() -> None:
    def rms_norm(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.cos(x)

    torch._dynamo.allow_in_graph(rms_norm)
    captured = lowered(lambda m, x: rms_norm(x, (K,)))
    assert check_pass(FuseNorms(taken), captured, X, changed=0).declined == []


def test_nothing_to_do_without_codes() -> None:
    assert check_pass(FuseNorms(taken), lowered(llama, config="int4wo"), X, changed=0).declined == []
