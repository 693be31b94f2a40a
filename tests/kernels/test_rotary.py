"""The CPU kernel of rotary embedding: the reference's bits and layout, for every shape, stride and thread count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.errors import ShapeMismatch, UnsupportedActivation
from fxquant.ops import reference
from tests.kernels.cpu_helpers import DTYPES, assert_equal

rotary = torch.ops.fxquant.rotary
pytestmark = pytest.mark.usefixtures("kernels")
SHAPES = [(2, 3, 5, 64), (1, 1, 1, 2), (2, 3, 4, 6), (3, 70), (34,), (2, 2, 3, 2, 96), (0, 3, 2, 4), (2, 3, 2, 0)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(x: Tensor) -> tuple[Tensor, Tensor]:
    last = x.shape[-2:]
    return random(*last, dtype=x.dtype, seed=1), random(*last, dtype=x.dtype, seed=2)


def assert_same(x: Tensor, cos: Tensor, sin: Tensor, isa: int = 0) -> None:
    got, want = rotary(x, cos, sin, isa), reference.rotary(x, cos, sin)
    assert got.stride() == want.stride()
    assert_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_the_bits_of_the_reference(isa: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    assert_same(x, *tables(x), isa)


def test_the_reference_is_the_formula() -> None:
    x, (cos, sin) = random(2, 3, 5, 8), tables(random(2, 3, 5, 8))
    a, b = x.chunk(2, -1)
    assert_equal(reference.rotary(x, cos, sin), x * cos + torch.cat((-b, a), -1) * sin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_a_joined_product_keep_their_order_in_memory(isa: int, dtype: torch.dtype) -> None:
    x = random(2, 7, 96, dtype=dtype)[..., :64].view(2, 7, 4, 16).transpose(1, 2)
    assert_same(x, *tables(x), isa)
    assert rotary(x, *tables(x), isa).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("leading", [(1, 1, 5), (2, 1, 5), (2, 3, 5), (1, 3, 1), (5,)], ids=str)
def test_tables_are_broadcast(isa: int, leading: tuple[int, ...]) -> None:
    x = random(2, 3, 5, 8)
    assert_same(x, random(*leading, 8, seed=1), random(*leading, 8, seed=2), isa)


def test_strided_tables_and_features(isa: int) -> None:
    x = random(2, 3, 8, 5).mT
    assert_same(x, random(8, 5, seed=1).mT, random(5, 16, seed=2)[:, ::2], isa)


def test_threads_change_no_bit(threads: None) -> None:
    x = random(2, 64, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert_same(x, *tables(x))


def test_what_does_not_fit_is_named() -> None:
    x = random(2, 5, 8)
    with pytest.raises(ShapeMismatch, match="even last dimension"):
        reference.rotary(x[..., :7], x[0, :, :7], x[0, :, :7])
    with pytest.raises(ShapeMismatch, match="cos"):
        reference.rotary(x, x[:, :4], x)
    with pytest.raises(ShapeMismatch, match="one dtype"):
        reference.rotary(x, x.bfloat16(), x)
    with pytest.raises(UnsupportedActivation):
        reference.rotary(x.double(), x.double(), x.double())
    with pytest.raises(RuntimeError, match="has size 4 where x has 5"):
        rotary(x, x[:, :4], x)
