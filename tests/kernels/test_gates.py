"""The product of a linear's two halves, one of them activated, on every instruction set: 'silu_first' and its kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import InvalidSpec, ShapeMismatch
from fxquant.ops import reference
from fxquant.ops.around import HALVES
from tests.kernels.cpu_helpers import DTYPES, ISAS, assert_equal, has_isa, through
from tests.kernels.test_around import FUNCTIONS, linears, normal

ops = torch.ops.fxquant
SHAPES = [(1, 128, 1), (3, 256, 37), (17, 384, 64), (70, 128, 357), (300, 640, 130)]
SPECS = ["int8/channel", "int4/group32"]

pytestmark = pytest.mark.usefixtures("kernels")


def apart(plain: Tensor, name: str, isa: int, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """What is to be made of a product float32 [M, N], by kernels whose numbers other tests vouch for; rounded once."""
    first, second = plain.chunk(2, -1)
    function, half = name.rsplit("_", 1)
    gate, other = (first, second) if half == "first" else (second, first)
    return (through(gate, isa, prologue=f"{function}_mul", by=other) + residual.float()).to(dtype)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_linear_is_its_product_in_float32_and_then_the_gate(
    isa: int, spec: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, k = shape
    residual = normal(m, n // 2, seed=9, dtype=dtype)
    for name, (x, *others) in linears(spec, m, n, k, dtype).items():
        op, wide = getattr(ops, name), [torch.float32 if a is dtype else a for a in others]
        plain = op(x if dtype in others else x.float(), *wide, isa)
        for half in HALVES:
            assert_equal(op(x, *others, isa, residual, half), apart(plain, half, isa, residual, dtype))


@pytest.mark.parametrize("half", HALVES)
def test_codes_that_siblings_share(isa: int, half: str) -> None:
    x, packed, scale, bias, k = linears("int8/channel", 9, 256, 70, torch.float32)["int8_linear_dynamic"]
    codes, x_scale = ops.int8_quantize_per_token(x)
    none = torch.zeros(9, 128)
    for dtype in DTYPES:
        got = ops.int8_linear(codes, x_scale, packed, scale, bias, k, dtype, isa, None, half)
        plain = ops.int8_linear(codes, x_scale, packed, scale, bias, k, torch.float32, isa)
        assert_equal(got, apart(plain, half, isa, none, dtype))


def test_sums_beyond_int32(isa: int) -> None:
    k = 131_072 + 5
    codes, x = torch.full((128, k), 127, dtype=torch.int8), torch.ones(2, k)
    arguments = (ops.int8_pack(codes), torch.full((128, 1), 2.0**-20), None, k, isa)
    plain = ops.int8_linear_dynamic(x, *arguments)
    got = ops.int8_linear_dynamic(x, *arguments, activation="silu_first")
    assert_equal(got, apart(plain, "silu_first", isa, torch.zeros(2, 64), torch.float32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("config", [0, 3 << 4, 2 << 4 | 1 << 7, 1 << 8], ids=["256 rows", "64", "by rows", "serial"])
def test_however_the_work_is_cut(threads: int, config: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in (1, 2, 40, 131, 700):
            for name, spec in (("int8_linear_dynamic", "int8/channel"), ("linear_dynamic", "int4/group32")):
                x, *others = linears(spec, m, 1408, 96, torch.float32)[name]
                op = getattr(ops, name)
                want = op(x, *others)
                for half in ("gelu_first", "gelu_second"):
                    got = op(x, *others, config, activation=half)
                    assert_equal(got, apart(want, half, 0, torch.zeros(m, 704), torch.float32))
    finally:
        torch.set_num_threads(before)


def test_many_passes_over_many_rows() -> None:
    # 8 MiB of staged rows at a time: 3000 rows of 4100 take two passes, so rows of the result are counted on.
    x, residual = normal(3000, 4100, seed=1), normal(3000, 64, seed=2)
    for name, (_, *others) in linears("int8/channel", 1, 128, 4100, torch.float32).items():
        op = getattr(ops, name)
        got = op(x, *others, 0, residual, "relu_second")
        assert_equal(got, apart(op(x, *others), "relu_second", 0, residual, torch.float32))


def test_all_instruction_sets_give_the_same_bits_for_integer_products() -> None:
    able = [isa for isa in ISAS if isa and has_isa(isa)]
    for dtype in DTYPES:
        x, *others = linears("int8/channel", 33, 256, 130, dtype)["int8_linear_dynamic"]
        for half in HALVES:
            results = [ops.int8_linear_dynamic(x, *others, isa, activation=half) for isa in able]
            for other in results[1:]:
                assert_equal(results[0], other)


@pytest.mark.parametrize("spec", SPECS)
def test_the_reference_is_its_parts(spec: str) -> None:
    residual = normal(5, 64, seed=3)
    for name, (x, *others) in linears(spec, 5, 128, 96, torch.float32).items():
        op: Any = getattr(reference, name)
        first, second = op(x, *others).chunk(2, -1)
        for function, compute in FUNCTIONS.items():
            assert_equal(op(x, *others, 0, residual, f"{function}_first"), compute(first) * second + residual)
            assert_equal(op(x, *others, 0, residual, f"{function}_second"), first * compute(second) + residual)


@pytest.mark.parametrize("spec", SPECS)
def test_fakes_opcheck_and_symbolic_rows(spec: str) -> None:
    for name, (x, *others) in linears(spec, 5, 128, 96, torch.bfloat16).items():
        op = getattr(ops, name).default
        torch.library.opcheck(op, (x, *others, 0, None, "silu_first"))
        torch.library.opcheck(op, (x, *others, 0, normal(5, 64, seed=4, dtype=x.dtype), "gelu_second"))

        def forward(x: Tensor, op: Any = op, others: list[Any] = others) -> Tensor:
            return op(x, *others, 0, None, "silu_first") + x.shape[0]

        compiled = torch.compile(forward, dynamic=True, fullgraph=True, backend="aot_eager")
        for m in (5, 8):
            rows = normal(m, 96, seed=5, dtype=x.dtype)
            assert_equal(compiled(rows), forward(rows))


def test_refusals() -> None:
    x, *others = linears("int8/channel", 3, 192, 20, torch.float32)["int8_linear_dynamic"]
    plain: Any = reference.int8_linear_dynamic
    words = "192 output features.*a multiple of 128 for the activation 'silu_first'"
    with pytest.raises(ShapeMismatch, match=words):
        plain(x, *others, activation="silu_first")
    with pytest.raises(RuntimeError, match="two halves of a multiple of 64 columns; met 192 in all"):
        ops.int8_linear_dynamic(x, *others, activation="silu_first")
    x, *others = linears("int8/channel", 3, 128, 20, torch.float32)["int8_linear_dynamic"]
    with pytest.raises(ShapeMismatch, match=r"residual of shape \[3, 128\]"):
        plain(x, *others, 0, torch.zeros(3, 128), "silu_first")
    with pytest.raises(RuntimeError, match="residual is not of the result's shape"):
        ops.int8_linear_dynamic(x, *others, 0, torch.zeros(3, 128), "silu_first")
    for name in ("tanh_first", "_first", "first"):
        with pytest.raises(InvalidSpec, match="gelu_tanh_first"):
            plain(x, *others, activation=name)
    for name in ("tanh_first", "first"):
        with pytest.raises(RuntimeError, match="before _first or _second"):
            ops.int8_linear_dynamic(x, *others, activation=name)


def test_gelu_is_torchs_own_on_the_first_half_in_float64() -> None:
    x, *others = linears("int8/channel", 64, 128, 96, torch.float32)["int8_linear_dynamic"]
    first, second = ops.int8_linear_dynamic(x, *others).double().chunk(2, -1)
    got = ops.int8_linear_dynamic(x, *others, activation="gelu_first").double()
    bound = 8 * 2.0**-24 * (first * second).abs() + 2.0**-149  # see ops.around
    assert ((got - F.gelu(first) * second).abs() <= bound).all()
