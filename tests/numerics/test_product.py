from __future__ import annotations

import pytest
import torch

from fxquant.numerics import MAX_IN_FEATURES, int8_matmul, matmul_float32, pack_int8, packed_shape, unpack_int8
from fxquant.spec import TensorSpec
from tests.twins import assert_same_bits

INT8 = TensorSpec.parse("int8/channel")
SHAPES = [(1, 1), (64, 4), (65, 5), (63, 3), (130, 33), (128, 8), (1, 257)]


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("rows", "columns", "sums"),
    [
        (64, 4, False),
        (128, 8, False),
        (64, 47, False),  # compact: one place in 48 is more than 2 %
        (64, 63, False),
        (130, 192, False),
        (130, 196, True),
        (65, 257, False),  # 3 places and 4 bytes of sums are more than 2 % of 261
        (64, 353, True),
    ],
)
def test_full_panels_element_by_element(rows: int, columns: int, sums: bool) -> None:
    codes = random_codes(rows, columns)
    packed = pack_int8(codes)
    assert list(packed.shape) == packed_shape(rows, columns)
    quads = -(-columns // 4)
    panels = 0 if columns == 47 else rows // 64
    want = torch.zeros(panels, quads + sums, 64, 4, dtype=torch.int8)
    for n in range(panels * 64):
        for k in range(columns):
            want[n // 64, k // 4, n % 64, k % 4] = codes[n, k]
        if sums:
            total = sum(codes[n].tolist())
            want[n // 64, -1, n % 64] = torch.tensor(list(total.to_bytes(4, "little", signed=True))).to(torch.int8)
    assert_same_bits(packed, torch.cat([want.flatten(), codes[panels * 64 :].flatten()]))


@pytest.mark.parametrize("n", [1, 8, 10, 16, 24, 40, 80, 100, 1000, 4096])
@pytest.mark.parametrize("k", [1, 3, 9, 13, 27, 64, 147, 160, 256, 257, 350, 576, 1001])
def test_narrow_weights_take_what_the_format_promises(n: int, k: int) -> None:
    codes = random_codes(n, k)
    packed = pack_int8(codes)
    assert_same_bits(unpack_int8(packed, n, k), codes)
    promised = INT8.nbytes((n, k))
    assert abs(packed.numel() + 4 * n - promised) <= 0.02 * promised


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
