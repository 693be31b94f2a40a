"""Weights in steps are int8 weights: their products are, bit by bit, those of the int8 kernels with one scale a row."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from fxquant.numerics import spread
from fxquant.numerics.panels import steps_of, stores_steps
from fxquant.spec import TensorSpec
from tests.kernels.coded_problems import Coded, coded
from tests.kernels.cpu_helpers import DTYPES, SECOND_ORDER, assert_within, multiplies_digits

ops = torch.ops.fxquant


pytestmark = pytest.mark.usefixtures("kernels")

# Full panels, some beside rows alone, rows alone; a block of K and a part of one; several pieces that are spread.
SIZES = ((64, 256), (128, 1096), (70, 264), (100, 335), (20, 440))
SPECS = ("int4/group32/stepped", "int3/group8/stepped", "int2/group12/stepped", "int4/group1000/stepped")
ROWS = (1, 2, 5, 6, 7, 17, 40)  # few, which the planes serve, and more


@pytest.mark.parametrize("text", SPECS)
def test_all_of_these_have_steps(text: str) -> None:
    assert all(stores_steps(k, TensorSpec.parse(text)) for _, k in SIZES)


def as_int8(p: Coded) -> tuple[Tensor, Tensor]:
    """Packed int8 codes of the same values, and the scale of each row."""
    steps = steps_of(p.scale).float()
    codes = p.codes.double() * spread(p.scale.double() / steps[:, None].double(), p.codes.shape, p.spec.granularity)
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= 128
    return ops.int8_pack(codes.to(torch.int8)), steps


def dynamic(p: Coded, x: Tensor, dtype: torch.dtype, isa: int, *after: Tensor | str | None) -> Tensor:
    return ops.linear_dynamic(x, *p.packed, p.bias, *p.sizes, p.text, dtype, isa, *after)


def around(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, str]:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(9)).to(dtype), "silu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", SPECS)
def test_codes_of_x_give_the_bits_of_the_int8_product(isa: int, text: str, dtype: torch.dtype) -> None:
    for (n, k), m in product(SIZES, ROWS):
        p = coded(text, n, k, seed=n + k)
        packed, steps = as_int8(p)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        residual, activation = around(n, m, dtype)
        for after in ((), (residual, activation)):
            got = dynamic(p, x, dtype, isa, *after)
            assert torch.equal(got, ops.int8_linear_dynamic(x, packed, steps, p.bias, k, isa, *after))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", SPECS)
def test_digits_of_x_give_the_bits_of_the_int8_product(isa: int, text: str, dtype: torch.dtype) -> None:
    if not multiplies_digits(isa):
        pytest.skip("this instruction set multiplies floats with decoded values, whose sums are rounded")
    for (n, k), m in product(SIZES, ROWS):
        p = coded(text, n, k, seed=n + k)
        packed, steps = as_int8(p)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        got = p.weight_only(ops.linear_weight_only, x, p.bias, dtype, isa)
        assert torch.equal(got, ops.int8_linear_weight_only(x, packed, steps, p.bias, k, isa))


def test_halves_that_are_multiplied_are_those_of_the_int8_product(isa: int) -> None:
    p = coded("int4/group32/stepped", 256, 256, seed=3)
    packed, steps = as_int8(p)
    for m in ROWS:
        x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m))
        for gate in ("silu_first", "gelu_second"):
            got = dynamic(p, x, torch.float32, isa, None, gate)
            assert torch.equal(got, ops.int8_linear_dynamic(x, packed, steps, p.bias, 256, isa, None, gate))


@pytest.mark.parametrize("m", [1, 20])
def test_a_row_of_zeros_gives_zeros_and_one_that_holds_nan_gives_nan(isa: int, m: int) -> None:
    p = coded("int4/group32/stepped", 64, 256, seed=4)
    p.scale[5] = 0.0
    p.scale[7, 1] = torch.nan
    y = p.dynamic(ops.linear_dynamic, torch.randn(m, 256), None, torch.float32, isa)
    assert (y[:, 5] == 0).all()
    assert y[:, 7].isnan().all()
    assert y[:, [*range(7), *range(8, 64)]].isfinite().all()


def test_a_row_of_x_does_not_depend_on_how_many_stand_beside_it(isa: int) -> None:
    p = coded("int4/group32/stepped", 128, 640, seed=5)
    x = torch.randn(70, 640, generator=torch.Generator().manual_seed(0))
    whole = p.dynamic(ops.linear_dynamic, x, p.bias, torch.float32, isa)
    for m in ROWS:
        assert torch.equal(p.dynamic(ops.linear_dynamic, x[:m], p.bias, torch.float32, isa), whole[:m])


@pytest.mark.parametrize("m", [1, 9])
def test_granules_that_are_no_whole_quads_are_decoded(isa: int, m: int) -> None:
    p = coded("int4/group9/stepped", 100, 333, seed=7)
    x = torch.randn(m, 333, generator=torch.Generator().manual_seed(m))
    want, bound = p.kernel_bound(x, isa)
    got = p.weight_only(ops.linear_weight_only, x, None, torch.float32, isa)
    assert_within(got, want, SECOND_ORDER * bound)


def test_beyond_the_reach_of_int32_granules_are_scaled_one_by_one(isa: int) -> None:
    k = 2**17 + 64
    p = coded("int4/group512/stepped", 64, k, seed=6)
    x = torch.ones(2, k)
    y = p.dynamic(ops.linear_dynamic, x, None, torch.float32, isa)
    torch.testing.assert_close(y.double(), x.double() @ p.terms()[0].t(), rtol=2e-4, atol=1e-2)
