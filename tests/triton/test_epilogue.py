"""The epilogue that all linear kernels share: against float64, within the bound that its docstring gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fxquant.triton_kernels.epilogue import ACTIVATIONS as NAMES
from fxquant.triton_kernels.epilogue import epilogue_meta, finish
from tests.triton.helpers import ACTIVATIONS, U, assert_exact, assert_within

M, N = 5, 23
BLOCK_M, BLOCK_N = 8, 16


@triton.jit
def _epilogue(y_ptr, bias_ptr, residual_ptr, out_ptr, M, N, stride_rm, HAS_BIAS: tl.constexpr,
              HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    rows, cols = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    y = finish(y, bias_ptr, residual_ptr, rows, cols, M, N, stride_rm, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    tl.store(out_ptr + at, y, mask=inside)


def _run(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    out = torch.full_like(y, torch.nan)
    meta = epilogue_meta(bias, residual, activation)
    stride = 0 if residual is None else residual.stride(0)
    grid = (triton.cdiv(y.shape[1], BLOCK_N),)
    kernel: Any = _epilogue
    kernel[grid](y, bias, residual, out, *y.shape, stride, **meta, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return out


def test_every_activation_of_the_operands_is_here() -> None:
    assert tuple(ACTIVATIONS) == NAMES


def test_the_form_of_gelu_tanh_is_torchs_function() -> None:
    y = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["gelu_tanh"](y), F.gelu(y, approximate="tanh"), rtol=0, atol=1e-15)


@pytest.mark.parametrize("activation", NAMES)
def test_activation_against_float64(activation: str) -> None:
    torch.manual_seed(0)
    y = torch.randn(M, N) * 4
    y64 = ACTIVATIONS[activation](y.double())
    slack = 2 * U * y.double().abs() * 8 if activation == "gelu" else 2 * U * (y.double().abs() + 8) * y64.abs()
    assert_within(_run(y, None, None, activation), y64, slack if activation not in ("", "relu") else slack * 0)


def test_order_is_bias_activation_residual() -> None:
    torch.manual_seed(1)
    y, bias, wide = torch.randn(M, N), torch.randn(N).half(), torch.randn(M, N + 9).half()
    residual = wide[:, :N]
    assert_exact(_run(y, bias, residual, "relu"), torch.relu(y + bias.float()) + residual.float())
    assert_exact(_run(y, None, residual, ""), y + residual.float())
    assert_exact(_run(y, bias, None, ""), y + bias.float())


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("activation", NAMES)
def test_what_is_not_finite_comes_out_as_torch_defines_it(activation: str) -> None:
    y = torch.zeros(M, N)
    y[0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 0.0])
    # torch itself gives NaN for gelu of infinity in float32 on some CPUs, but not in float64.
    assert_exact(_run(y, None, None, activation).double(), ACTIVATIONS[activation](y.double()))
