"""fuse-epilogues: activation and residual go into the kernel, or stay with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.annotation import note_of
from fxquant.graphs import CapturedGraph
from fxquant.lowering import select_kernels
from fxquant.passes import FuseEpilogues
from fxquant.spec import QuantConfig
from fxquant.target import Target
from tests.passes.helpers import Forward, K, Linears, X, check_pass, nodes_of, staged, within

fx = torch.ops.fxquant
SM90 = Target("cuda", arch="sm90")
SQUARE = (K, K, K)
R = torch.rand(5, K, generator=torch.Generator().manual_seed(5))


def lowered(forward: Forward, *inputs: Any, config: QuantConfig | str = "int4wo", **options: Any) -> CapturedGraph:
    """Linears of K to K features behind their kernels."""
    dynamic = options.pop("dynamic", False)
    model = Linears(forward, widths=SQUARE, **options).to(inputs[0].dtype)
    captured = staged(model, *inputs, config=config, dynamic=dynamic)
    select_kernels(captured.gm, SM90)
    return captured


def epilogues(captured: CapturedGraph) -> list[tuple[Any, ...]]:
    """(has bias, has residual, activation) of each tiled linear, in graph order."""
    sites = [(n.args[5:8]) for n in nodes_of(captured.gm, fx.tiled_linear.default)]
    sites += [(n.args[8:11]) for n in nodes_of(captured.gm, fx.tiled_linear_codes.default)]
    return [(bias is not None, residual is not None, activation) for bias, residual, activation in sites]


ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("config", ["int4wo", "int8dq"])
def test_an_activation(name: str, config: str) -> None:
    captured = lowered(lambda m, x: ACTIVATIONS[name](m.a(x)), X, config=config)
    result = check_pass(FuseEpilogues(), captured, X, changed=1)
    assert result.declined == []
    assert epilogues(captured) == [(False, False, name)]
    (site,) = [n for n in captured.gm.graph.nodes if note_of(n).kernel]
    assert note_of(site).kernel.endswith(f"+{name}")
    assert note_of(site).made_by[-1] == "fuse-epilogues"


@pytest.mark.parametrize(
    "activation",
    [
        torch.relu,
        lambda x: x.relu(),
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu_(),
        lambda x: F.silu(x, inplace=True),
        torch.ops.aten.relu.default,
        lambda x: torch.ops.aten.gelu.default(x, approximate="tanh"),
        nn.ReLU(),
    ],
)
def test_every_spelling_of_an_activation(activation: Any) -> None:
    check_pass(FuseEpilogues(), lowered(lambda m, x: activation(m.a(x)), X), X, changed=1)


@pytest.mark.parametrize(
    "add",
    [
        lambda r, y: r + y,
        lambda r, y: y + r,
        torch.add,
        lambda r, y: r.add(y),
        lambda r, y: y.add_(r),
        lambda r, y: torch.ops.aten.add.Tensor(r, y),
    ],
)
def test_every_spelling_of_a_residual(add: Any) -> None:
    captured = lowered(lambda m, x: add(x, m.a(x)), X, bias=True)
    check_pass(FuseEpilogues(), captured, X, changed=1)
    assert epilogues(captured) == [(True, True, "")]


def test_activation_and_residual_of_two_layers() -> None:
    captured = lowered(lambda m, x: x + m.b(F.silu(m.a(x))), X)
    check_pass(FuseEpilogues(), captured, X, changed=2)
    assert epilogues(captured) == [(False, False, "silu"), (False, True, "")]


def test_a_residual_behind_an_activation() -> None:
    captured = lowered(lambda m, x: F.gelu(m.a(x)) + x, X)
    check_pass(FuseEpilogues(), captured, X, changed=2)
    assert epilogues(captured) == [(False, True, "gelu")]


def test_an_activation_behind_a_residual_stays() -> None:
    captured = lowered(lambda m, x: F.gelu(m.a(x) + x), X)
    check_pass(FuseEpilogues(), captured, X, changed=1)
    assert epilogues(captured) == [(False, True, "")]


def test_a_residual_that_is_computed_later() -> None:
    captured = lowered(lambda m, x: m.a(x) + torch.cos(x), X)
    check_pass(FuseEpilogues(), captured, X, changed=1)


def test_one_linear_of_a_sum_of_two_takes_the_other() -> None:
    captured = lowered(lambda m, x: m.a(x) + m.b(x), X, config=QuantConfig("int4wo", fuse=False))
    check_pass(FuseEpilogues(), captured, X, changed=1)
    assert sorted(epilogues(captured)) == [(False, False, ""), (False, True, "")]


def test_dynamic_rows() -> None:
    check_rows = lowered(lambda m, x: x + F.relu(m.a(x)), X, dynamic=True)
    assert FuseEpilogues().run(check_rows.gm).changed == 2


def test_rows_that_are_counted_when_the_graph_runs() -> None:
    # Nothing is known of the number of rows, not even whether it is one: a comparison would raise.
    def forward(m: Any, x: Tensor) -> Tensor:
        chosen = x[x[:, 0] > 0.2]
        return m.a(chosen) + chosen + m.b(chosen) + x[:1]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured = lowered(forward, X, config=QuantConfig("int4wo", fuse=False), dynamic=True)
        assert FuseEpilogues().run(captured.gm).changed == 2


def test_a_function_of_the_users_is_no_activation() -> None:
    def relu(x: Tensor) -> Tensor:
        return torch.cos(x)

    torch._dynamo.allow_in_graph(relu)
    check_pass(FuseEpilogues(), lowered(lambda m, x: relu(m.a(x)), X), X, changed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_one_rounding_is_left(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    captured = lowered(lambda m, x: x + F.silu(m.a(x)), x)
    # Before, the linear, the function and the sum, of at most 5, rounded each.
    check_pass(FuseEpilogues(), captured, x, changed=2, compare=within(3 * 5 * torch.finfo(dtype).eps))


def refused(forward: Forward, words: str, *inputs: Any, changed: int = 0, **options: Any) -> None:
    captured = lowered(forward, *(inputs or (X,)), **options)
    result = check_pass(FuseEpilogues(), captured, *(inputs or (X,)), changed=changed)
    assert [row.reason for row in result.declined] == [words]
    assert result.declined[0].where in "abc"


def test_a_result_with_other_readers() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return F.silu(y), torch.cos(y)

    refused(forward, "silu: the linear's result is read by cos too")
    refused(lambda m, x: (y := m.a(x), x + y)[1] * y, "residual: the linear's result is read by mul too")


def test_a_gate_is_no_epilogue() -> None:
    captured = lowered(lambda m, x: F.silu(m.a(x)) * m.b(x), X, config=QuantConfig("int4wo", fuse=False))
    check_pass(FuseEpilogues(), captured, X, changed=1)


def test_what_is_added_in_another_shape_or_dtype() -> None:
    words = "residual: what is added is [16] torch.float32, the linear's result [5, 16] torch.float32"
    refused(lambda m, x: m.a(x) + x[0], words)
    words = "residual: what is added is [5, 16] torch.float16, the linear's result [5, 16] torch.float32"
    refused(lambda m, x: m.a(x) + x.half(), words)
    refused(lambda m, x: m.a(x) + 1.0, "residual: what is added is no other tensor")
    refused(lambda m, x: (lambda y: y + y)(m.a(x)), "residual: what is added is no other tensor")
    refused(lambda m, x: torch.add(x, m.a(x), alpha=2), "residual: what is added is scaled first")


def test_a_sum_that_is_larger_or_wider() -> None:
    words = "residual: it makes shape [2, 5, 16] of [5, 16], or other strides"
    refused(lambda m, x: m.a(x) + torch.stack([x, x]), words)
    words = "residual: it makes torch.float64 of torch.float32"
    refused(lambda m, x: m.a(x) + x.double(), words)


def test_what_the_model_writes_to() -> None:
    def in_place(m: Any, x: Tensor) -> Tensor:
        h = torch.cos(x)
        h += m.a(x)
        return h

    refused(in_place, "residual: the model adds in place to what is read elsewhere")

    def between(m: Any, x: Tensor) -> Tensor:
        h = torch.cos(x)
        y = m.a(h)
        h.mul_(2)
        return y + x

    refused(between, "residual: the model writes to an input of the linear before it adds")


def test_linears_that_are_not_lowered_are_left() -> None:
    captured = staged(Linears(lambda m, x: F.relu(m.a(x)), widths=SQUARE), X, config="int4wo")
    assert check_pass(FuseEpilogues(), captured, X, changed=0).declined == []
