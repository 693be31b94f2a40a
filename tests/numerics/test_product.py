from __future__ import annotations

import pytest
import torch

from fxquant.numerics import MAX_IN_FEATURES, int8_matmul, matmul_float32, pack_int8, packed_shape, unpack_int8
from tests.twins import assert_same_bits

SHAPES = [(1, 1), (64, 4), (65, 5), (63, 3), (130, 33), (128, 8), (1, 257)]


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_packed_layout_element_by_element(rows: int, columns: int) -> None:
    codes = random_codes(rows, columns)
    packed = pack_int8(codes)
    assert list(packed.shape) == packed_shape(rows, columns)
    assert packed.is_contiguous()
    want = torch.zeros_like(packed)
    for n in range(rows):
        for k in range(columns):
            want[n // 64, k // 4, n % 64, k % 4] = codes[n, k]
        total = sum(codes[n].tolist())
        want[n // 64, -1, n % 64] = torch.tensor(list(total.to_bytes(4, "little", signed=True))).to(torch.int8)
    assert_same_bits(packed, want)


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (0, 8), (8, 0)])
def test_unpack_is_the_inverse_and_owns_its_memory(rows: int, columns: int) -> None:
    codes = random_codes(rows, columns)
    packed = pack_int8(codes)
    again = unpack_int8(packed, rows, columns)
    assert_same_bits(again, codes)
    assert again.is_contiguous()
    assert again.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr() or codes.numel() == 0


def test_every_code_survives_packing() -> None:
    codes = torch.arange(-128, 128).to(torch.int8).reshape(16, 16)
    assert_same_bits(unpack_int8(pack_int8(codes), 16, 16), codes)


def test_packing_reads_strides() -> None:
    codes = random_codes(70, 70)
    assert_same_bits(pack_int8(codes.t()), pack_int8(codes.t().contiguous()))


@pytest.mark.parametrize("k", [0, 1, 33, 1023, 1024, 1025, 2051])
@pytest.mark.parametrize("m", [0, 1, 17])
def test_product_is_exact(m: int, k: int) -> None:
    x, w = random_codes(m, k).clamp(min=-127), random_codes(31, k).clamp(min=-127)
    got = int8_matmul(x, w)
    assert torch.equal(got, x.long() @ w.long().t())


@pytest.mark.parametrize("k", [66_000, 140_001])
@pytest.mark.parametrize("sign", [1, -1])
def test_product_is_exact_where_sums_are_largest(sign: int, k: int) -> None:
    x = torch.full((1, k), 127, dtype=torch.int8)
    w = torch.full((2, k), sign * 127, dtype=torch.int8)
    w[1, -1] = sign * 126  # an odd sum, which float32 could not hold
    assert int8_matmul(x, w).tolist() == [[sign * 127 * 127 * k, sign * (127 * 127 * k - 127)]]


def test_the_largest_in_features_fits_the_packed_sums() -> None:
    largest = torch.iinfo(torch.int32).max
    assert 127 * MAX_IN_FEATURES <= largest < 127 * (MAX_IN_FEATURES + 2**18)


def test_autocast_does_not_reach_into_products() -> None:
    x, w = random_codes(3, 300).clamp(min=-127), random_codes(5, 300).clamp(min=-127)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int8_matmul(x, w), x.long() @ w.long().t())
        assert matmul_float32(x.float(), w).dtype == torch.float32
