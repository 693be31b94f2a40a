"""Features of no full panel, which kernels spread as they read them: the same sums as in a full one, at every size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.coded_problems import FEW_SPECS, FLOAT_SPECS, INTEGER_SPECS, Coded, coded
from tests.kernels.cpu_helpers import SECOND_ORDER, U, assert_equal, assert_within, loaded, need_isa, problem
from tests.kernels.test_cpu_weight_only import check

ops = torch.ops.fxquant
FEATURES = (1, 8, 10, 16, 24, 40, 80, 100, 1000, 4096)
DEPTHS = (1, 3, 9, 13, 27, 64, 147, 160, 257, 576, 1001)
# Each width, and each way that numbers are held: by panel, once for a tensor, once for a block.
WIDTHS = [
    "int2/tensor/affine",
    "int3/block24x16/shift",
    "int4/group32/affine/bf16",
    "fp5_e2m2/group32/e8m0",
    "fp6_e3m2/channel",
    "int7/block128x8/bf16",
    "float8_e4m3fn/tensor",
]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    loaded()


@pytest.fixture(params=[1, 2, 3, 4, 5], ids=["portable", "avx2", "avx512vnni", "amx", "avxvnni"])
def isa(request: pytest.FixtureRequest) -> int:
    return need_isa(request.param)


def random_x(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("n", FEATURES)
def test_int8(isa: int, n: int, k: int) -> None:
    p, x = problem(n, k, seed=50, exact=False), random_x(3, k)
    assert_equal(p.packed, reference.int8_pack(p.codes))
    want = reference.int8_linear_dynamic(x, p.packed, p.scale, p.bias, k)
    assert_equal(ops.int8_linear_dynamic(x, p.packed, p.scale, p.bias, k, isa), want)
    check(isa, p, x, ops.int8_linear_weight_only(x, p.packed, p.scale, p.bias, k, isa), p.bias)


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("n", FEATURES)
def test_float_products(n: int, k: int) -> None:
    for text in WIDTHS if n < 1000 else WIDTHS[:3]:
        p, x = coded(text, n, k, seed=51), random_x(3, k)
        assert torch.equal(ops.pack_panels(p.codes, text), reference.pack_panels(p.codes, text))
        for isa in (1, 2, 3):
            exact, bound = p.kernel_bound(x, isa)
            got = p.weight_only(ops.linear_weight_only, x, None, torch.float32, need_isa(isa))
            assert_within(got, exact, SECOND_ORDER * bound)


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("n", FEATURES)
def test_integer_products(n: int, k: int) -> None:
    """Powers of two as scales, and one row of x that is a power of two times integers: exact, as the reference is."""
    for text in ("int4/group32/bf16", "int7/channel", "int3/tensor/affine", "int8/group20/affine"):
        p = coded(text, n, k, seed=52, exact=True)
        x = torch.randint(-127, 128, (2, k), generator=torch.Generator().manual_seed(k)).float()
        x[:, 0] = 127.0
        want = p.dynamic(reference.linear_dynamic, x, p.bias, torch.float32)
        for isa in (1, 2, 3):
            assert_equal(p.dynamic(ops.linear_dynamic, x, p.bias, torch.float32, need_isa(isa)), want)


def first_rows(p: Coded, n: int) -> Coded:
    def part(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.shape[0] == 1 else t[:n]

    numbers = {name: part(getattr(p, name)) for name in ("scale", "zero_point", "tensor_scale")}
    return dataclasses.replace(p, codes=p.codes[:n], bias=p.bias[:n], **numbers)


@pytest.mark.parametrize("text", [text for text in INTEGER_SPECS + FLOAT_SPECS if "block" not in text])
def test_a_part_of_a_panel_gives_the_bits_of_a_full_one(isa: int, text: str) -> None:
    for n, k in ((1, 8), (40, 264), (63, 449)):
        whole = coded(text, 64, k, seed=53)
        part, x = first_rows(whole, n), random_x(7, k)
        want = whole.weight_only(ops.linear_weight_only, x, whole.bias, torch.float32, isa)[:, :n]
        assert_equal(part.weight_only(ops.linear_weight_only, x, part.bias, torch.float32, isa), want)
        if text.startswith("int") and "shift" not in text and "group30" not in text:
            want = whole.dynamic(ops.linear_dynamic, x, whole.bias, torch.float32, isa)[:, :n]
            assert_equal(part.dynamic(ops.linear_dynamic, x, part.bias, torch.float32, isa), want)


@pytest.mark.parametrize("text", [*FEW_SPECS, "int2/group32/affine/bf16", "float8_e5m2/tensor"])
@pytest.mark.parametrize("shape", [(16, 3, 3), (70, 7, 1), (130, 16, 3)], ids=str)
def test_convolutions(isa: int, text: str, shape: tuple[int, int, int]) -> None:
    """A convolution of one position is a linear: the same codes, the same sums."""
    n, channels, reach = shape
    k = channels * reach
    p, x = coded(text, n, k, seed=54), random_x(1, k)
    got = ops.conv_weight_only(
        x.view(1, channels, reach), *p.packed, p.tensor_scale, p.bias, n, [reach], [1], [0], [1], text, isa
    )
    exact, bound = p.bound(x)
    want = exact + p.bias.double()
    assert_within(got[:, :, 0], want, SECOND_ORDER * (bound + U * want.abs()))
    q = problem(n, k, seed=55, exact=False)
    conv = (q.packed, q.scale, q.bias, [reach], [1], [0], [1])
    want = reference.int8_conv_dynamic(x.view(1, channels, reach), *conv)
    assert_equal(ops.int8_conv_dynamic(x.view(1, channels, reach), *conv, isa), want)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_compact_codes_at_any_address(isa: int, shift: int) -> None:
    p, x = coded("int6/channel", 70, 33, seed=56), random_x(5, 33)
    packed, scale, _ = p.packed
    moved = torch.cat([packed.new_zeros(shift), packed])[shift:]
    want = ops.linear_weight_only(x, packed, scale, None, None, None, 70, 33, p.text, torch.float32, isa)
    assert_equal(ops.linear_weight_only(x, moved, scale, None, None, None, 70, 33, p.text, torch.float32, isa), want)
