"""What the linears do around their product, on every instruction set: norms and gates, activations and residuals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import pack_granules, pack_panels, unpack_int8
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.kernels.cpu_helpers import (
    DTYPES,
    ISAS,
    SMALLEST_HALF_STEP,
    U_OUT,
    U,
    assert_equal,
    assert_within,
    has_isa,
    multiplies_digits,
    problem,
    through,
)
from tests.twins import fixed_point_error

ops = torch.ops.fxquant
FUNCTIONS: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
# Torch's own are off by 5.5u |x| (gelu) at most on these; measured of ours: 3.4u (gelu), 2u (the others).
OFF = 4 * U
SHAPES = [(1, 1, 1), (3, 65, 37), (17, 130, 64), (300, 100, 357)]


pytestmark = pytest.mark.usefixtures("kernels")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_on_the_whole_range(isa: int, name: str) -> None:
    steps = torch.cat([torch.linspace(-120, 120, 60_000), torch.linspace(-6, 6, 60_000)])
    small = torch.logspace(-38, 0, 4_000)
    x = torch.cat([steps, small, -small]).reshape(-1, 64)
    want = FUNCTIONS[name](x.double())
    assert_within(through(x, isa, activation=name), want, OFF * x.abs().double() + 2.0**-149)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_of_what_is_no_number(isa: int, name: str) -> None:
    for value in (float("nan"), float("inf"), 0.0, -200.0):
        x = torch.full((1, 1), value)
        got, want = through(x, isa, activation=name), FUNCTIONS[name](x.double()).float()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_is_added_before_the_rounding(isa: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    p = problem(n, k, seed=1, exact=True)
    x, residual = torch.randint(-3, 4, (m, k)).to(dtype), torch.randint(-9, 10, (m, n)).to(dtype)
    arguments = (x, p.packed, p.scale, p.bias, k, isa)
    for op in (ops.int8_linear_weight_only, ops.int8_linear_dynamic):
        bare = op(x.float(), *arguments[1:])
        assert_equal(op(*arguments, residual, "relu"), (bare.relu() + residual.float()).to(dtype))


@pytest.mark.parametrize("k", [1, 15, 16, 37, 357])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms(isa: int, norm: str, dtype: torch.dtype, k: int) -> None:
    x, weight = normal(5, k, seed=2, dtype=dtype) + 3, normal(k, seed=3, dtype=dtype)
    for by in (weight, None):
        shift = normal(k, seed=4, dtype=dtype) if norm == "layernorm" and by is not None else None
        got = through(x, isa, prologue=norm, by=by, shift=shift, eps=1e-5)
        wide, factor = x.double(), 1.0 if by is None else by.double()
        centre = wide.mean(-1, keepdim=True) if norm == "layernorm" else 0.0
        root = ((wide - centre).square().mean(-1, keepdim=True) + 1e-5).sqrt()
        want = (wide - centre) / root * factor + (0.0 if shift is None else shift.double())
        # Sums of K terms in 16 lanes and a tree, the mean's error magnified by 1 / root; some ten roundings besides.
        terms = k / 16 + 4
        off = (terms + 10) * U * (wide.abs() + wide.abs().mean(-1, keepdim=True)) / root * (1 + 1 / root)
        off = off * (factor if by is None else by.double().abs()) + 2 * U * want.abs()
        assert_within(got, want, off + U_OUT[dtype] * want.abs() + SMALLEST_HALF_STEP[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gates(isa: int, name: str, dtype: torch.dtype) -> None:
    both = normal(7, 2 * 37, seed=5, dtype=dtype)
    gate, up = both[:, :37], both[:, 37:]  # as the parts of a joined linear: strided
    want = FUNCTIONS[name](gate.double()) * up.double()
    bound = (OFF + U) * (gate.double() * up.double()).abs() + U_OUT[dtype] * want.abs() + SMALLEST_HALF_STEP[dtype]
    assert_within(through(gate, isa, prologue=f"{name}_mul", by=up), want, bound * (1 + 2.0**-7))


def linears(spec: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Every op over float x that takes a weight of that spec, with its arguments up to `isa`.

    x is exact in every dtype, and in the fixed point of each.
    """
    x = ((64 * normal(m, k, seed=6)).round().clamp(-255, 255) / 64).to(dtype)
    weight, bias = normal(n, k, seed=7), normal(n, seed=8)
    parsed = TensorSpec.parse(spec)
    codes, scale, *_ = quantize(weight, parsed)
    if spec == "int8/channel":
        operands = (ops.int8_pack(codes), scale, bias, k)
        static = (x, torch.tensor([0.03]), *operands)
        return {"int8_linear_dynamic": (x, *operands), "int8_linear_weight_only": (x, *operands)} | {
            "int8_linear_static": static
        }
    panels = (pack_panels(codes, parsed), pack_granules(scale, parsed, n, k), None)
    tail = (bias, n, k, str(parsed), dtype)
    return {"linear_dynamic": (x, *panels, *tail), "linear_weight_only": (x, *panels, None, *tail)}


@pytest.mark.parametrize("spec", ["int8/channel", "int4/group32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_linear_is_the_plain_one_of_what_it_is_told(
    isa: int, spec: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, k = shape
    residual, by = normal(m, n, seed=9, dtype=dtype), normal(m, k, seed=10, dtype=dtype)
    for name, (x, *others) in linears(spec, m, n, k, dtype).items():
        op = getattr(ops, name)
        for prologue, of_norm, eps in (("silu_mul", by, 0.0), ("layernorm", by[0], 1e-3)):
            before = {"prologue": prologue, "by": of_norm, "eps": eps}
            plain = op(through(x, isa, **before), *others, isa, residual)
            assert_equal(op(x, *others, isa, residual, **before), plain)
            got = op(x, *others, isa, residual, "gelu", **before)
            wide = [torch.float32 if a is dtype else a for a in others]
            made = through(x, isa, **before)
            inner = op(made if dtype in others else made.float(), *wide, isa).double()
            want = F.gelu(inner) + residual.double()
            bound = 2 * OFF * inner.abs() + (U + U_OUT[dtype]) * want.abs() + SMALLEST_HALF_STEP[dtype]
            if name == "int8_linear_weight_only" and multiplies_digits(isa):  # of 16 bits in coarser fixed point
                rounded = [fixed_point_error(t, unpack_int8(others[0], n, k) * others[1]) for t in (made, made.float())]
                bound = bound + 1.13 * sum(rounded)
            assert_within(got, want, bound * (1 + 2.0**-7))


def test_x_in_groups_is_quantized_after_its_prologue(isa: int) -> None:
    x, *others = linears("int8/group32", 17, 130, 96, torch.float32)["linear_dynamic"]
    gate = normal(17, 96, seed=10)
    for prologue, by in (("silu_mul", gate), ("rmsnorm", gate[0])):
        before = {"prologue": prologue, "by": by, "eps": 1e-3 if by.dim() == 1 else 0.0}
        plain = ops.linear_dynamic(through(x, isa, **before), *others, isa, x_group=32)
        assert_equal(ops.linear_dynamic(x, *others, isa, **before, x_group=32), plain)


def test_all_instruction_sets_give_the_same_bits_for_integer_products() -> None:
    able = [isa for isa in ISAS if isa and has_isa(isa)]
    for dtype in DTYPES:
        x, *others = linears("int8/channel", 33, 70, 130, dtype)["int8_linear_dynamic"]
        for prologue in ("rmsnorm", "layernorm", "gelu_mul", "gelu_tanh_mul", "silu_mul"):
            by = normal(130, seed=11) if "norm" in prologue else normal(33, 130, seed=11, dtype=dtype)
            first, *rest = [
                ops.int8_linear_dynamic(x, *others, isa, None, "silu", prologue, by, None, 1e-6) for isa in able
            ]
            for other in rest:
                assert_equal(first, other)


def test_the_reference_is_its_parts() -> None:
    x, *others = linears("int8/channel", 5, 70, 130, torch.float32)["int8_linear_dynamic"]
    by, residual = normal(5, 130, seed=12), normal(5, 70, seed=13)
    plain: Any = reference.int8_linear_dynamic
    got = plain(x, *others, 0, residual, "silu", "gelu_mul", by)
    assert_equal(got, F.silu(plain(F.gelu(x) * by, *others)) + residual)
    got = plain(x, *others, 0, None, "", "layernorm", by[0], by[1], 1e-3)
    assert_equal(got, plain(F.layer_norm(x, (130,), by[0], by[1], 1e-3), *others))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_passes_over_many_rows(threads: int) -> None:
    # 8 MiB of staged rows at a time: 3000 rows of 4100 take two passes, so rows of residual and gate are counted on.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, up, residual = normal(3000, 4100, seed=14), normal(3000, 4100, seed=15), normal(3000, 3, seed=16)
        p = problem(3, 4100, seed=17, exact=False)
        arguments = (p.packed, p.scale, None, 4100, 0)
        got = ops.int8_linear_dynamic(x, *arguments, residual, "", "relu_mul", up)
        assert_equal(got, ops.int8_linear_dynamic(x.relu() * up, *arguments) + residual)
    finally:
        torch.set_num_threads(before)
