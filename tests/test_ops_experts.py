"""experts_linear and experts_matmul: each run of rows with its own matrix, against the ops of a single one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import GradientsNeedTraining, InvalidSpec, ShapeMismatch, UnsupportedActivation

fx = torch.ops.fxquant
E, N, K = 4, 70, 40
RUNS = ([3, 3, 7, 9], [0, 0, 0, 9], [9, 9, 9, 9], [2, 2, 5, 6], [0, 0, 0, 0])  # the last two leave rows to none


def weights(layout: str) -> tuple[list[Any], list[Tensor]]:
    """The parts of E packed matrices with their constants, and what they stand for."""
    torch.manual_seed(0)
    matrices = torch.randn(E, N, K)
    if layout == "int8":
        each = [fx.int8_quantize_per_token(one) for one in matrices]
        parts = [torch.stack([fx.int8_pack(codes) for codes, _ in each]), torch.stack([scale for _, scale in each])]
        values = [codes.float() * scale for codes, scale in each]
        return [*parts, None, None, N, K, "int8/channel", layout], values
    spec = "int4/group16/affine"
    each = [fx.quantize_weight(one, spec) for one in matrices]
    values = [fx.dequantize(codes, scale, zero, spec, torch.float32) for codes, scale, zero, _ in each]
    if layout == "rows":
        rows = [(fx.pack_rows(codes, spec), scale, zero) for codes, scale, zero, _ in each]
    else:
        rows = [
            (fx.pack_panels(codes, spec), fx.pack_granules(scale, spec, N, K), fx.pack_granules(zero, spec, N, K))
            for codes, scale, zero, _ in each
        ]
    return [*(torch.stack(part) for part in zip(*rows, strict=True)), None, N, K, spec, layout], values


def single(x: Tensor, ends: Tensor, values: list[Tensor]) -> Tensor:
    y = torch.zeros(len(x), len(values[0]), dtype=torch.float64)
    begin = 0
    for end, value in zip(ends.tolist(), values, strict=True):
        y[begin:end] = x[begin:end].double() @ value.double().t()
        begin = end
    return y


@pytest.mark.parametrize(
    ("layout", "dynamic"), [("int8", False), ("int8", True), ("panels", False), ("panels", True), ("rows", False)]
)
@pytest.mark.parametrize("runs", RUNS)
def test_each_row_meets_its_matrix(runs: list[int], layout: str, dynamic: bool) -> None:
    packed, values = weights(layout)
    x, ends = torch.randn(9, K), torch.tensor(runs)
    y = fx.experts_linear(x, ends, *packed, dynamic)
    seen = fx.fake_quantize(x, "int8/token") if dynamic else x
    want, most = single(seen, ends, values), single(seen.abs(), ends, [value.abs() for value in values])
    assert y.dtype is torch.float32
    assert ((y.double() - want).abs() <= (K + 5) * 2.0**-24 * most).all()
    assert not y[runs[-1] :].any()


@pytest.mark.parametrize("runs", RUNS)
def test_float_matrices_and_both_gradients(runs: list[int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, K, requires_grad=True), torch.randn(E, N, K, requires_grad=True)
    ends, grad = torch.tensor(runs), torch.randn(9, N)
    grad[runs[-1] :] = torch.nan  # of results that are 0 whatever x is
    y = fx.experts_matmul(x, ends, weight)
    y.backward(grad)
    wide = weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    want = single(x.detach(), ends, list(weight.detach()))
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)
    begin, total = 0, torch.zeros((), dtype=torch.float64)
    for i, end in enumerate(runs):
        total = total + ((wide[1][begin:end] @ wide[0][i].t()) * grad[begin:end]).sum()
        begin = end
    total.backward()
    for got, exact in ((weight.grad, wide[0].grad), (x.grad, wide[1].grad)):
        assert got is not None
        exact = torch.zeros_like(got) if exact is None else exact
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["int8", "panels", "rows"])
def test_the_gradient_to_x_is_that_of_the_decoded_matrices(layout: str, dtype: torch.dtype) -> None:
    packed, values = weights(layout)
    x, ends, grad = (
        torch.randn(9, K).to(dtype).requires_grad_(),
        torch.tensor([2, 2, 5, 6]),
        torch.randn(9, N).to(dtype),
    )
    fx.experts_linear(x, ends, *packed, layout != "rows").backward(grad)
    assert x.grad is not None
    want = single(grad, ends, [value.t() for value in values])
    unit = 2.0**-24 if dtype is torch.float32 else 2.0**-8
    most = single(grad.abs(), ends, [value.abs().t() for value in values])
    assert ((x.grad.double() - want).abs() <= (N + 5) * 2.0**-24 * most + unit * want.abs()).all()


@pytest.mark.parametrize("name", ["linear", "linear_backward", "matmul", "outer"])
def test_opcheck(name: str) -> None:
    packed, _ = weights("panels")
    x, grad, ends = torch.randn(9, K), torch.randn(9, N), torch.tensor([3, 3, 7, 8])
    arguments = {
        "linear": (x.clone().requires_grad_(), ends, *packed, True),
        "linear_backward": (grad, ends, *packed),
        "matmul": (x.clone().requires_grad_(), ends, torch.randn(E, N, K, requires_grad=True)),
        "outer": (grad, x, ends),
    }
    torch.library.opcheck(getattr(fx, f"experts_{name}").default, arguments[name])


def test_what_does_not_fit_is_named() -> None:
    packed, _ = weights("int8")
    x, ends = torch.randn(9, K), torch.tensor([3, 3, 7, 9])
    with pytest.raises(ShapeMismatch, match=r"rows of shape \[9, 39\]"):
        fx.experts_linear(x[:, 1:], ends, *packed, False)
    with pytest.raises(ShapeMismatch, match="ends of shape"):
        fx.experts_linear(x, ends.int(), *packed, False)
    with pytest.raises(ShapeMismatch, match="codes of 4 matrices"):
        fx.experts_linear(x, ends[1:], *packed, False)
    with pytest.raises(InvalidSpec, match="a layout is"):
        fx.experts_linear(x, ends, *packed[:-1], "columns", False)
    with pytest.raises(UnsupportedActivation):
        fx.experts_linear(x.long(), ends, *packed, False)
    with pytest.raises(ShapeMismatch, match=r"\[4, N, K\]"):
        fx.experts_matmul(x, ends, torch.randn(E, N, K).double())
    with pytest.raises(GradientsNeedTraining):
        fx.experts_linear(x, ends, packed[0], packed[1].requires_grad_(), *packed[2:], False).sum().backward()


def test_schemas_are_the_agreed_ones() -> None:
    names = ("experts_linear", "experts_linear_backward", "experts_matmul", "experts_outer")
    weight = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? tensor_scale"
    constants = "int out_features, int in_features, str spec, str layout"
    assert [str(getattr(fx, name).default._schema).removeprefix("fxquant::") for name in names] == [
        f"experts_linear(Tensor x, Tensor ends, {weight}, {constants}, bool dynamic) -> Tensor",
        f"experts_linear_backward(Tensor grad, Tensor ends, {weight}, {constants}) -> Tensor",
        "experts_matmul(Tensor x, Tensor ends, Tensor weight) -> Tensor",
        "experts_outer(Tensor grad, Tensor x, Tensor ends) -> Tensor",
    ]
