"""The CPU kernels of embedding_dequantize and decode_rows against their references, bit for bit, in every spec."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.kernels.coded_problems import SPECS
from tests.kernels.cpu_helpers import DTYPES, assert_equal, loaded

ops = torch.ops.fxquant
MORE_SPECS = ("int8/channel1", "int5/channel-1/affine", "int8/token", "mxfp4", "nvfp4", "mxfp8")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    loaded()


def table(spec: str, count: int, width: int) -> tuple[Any, ...]:
    """rows, scale, zero_point, tensor_scale, width, spec: every code of the format occurs, if there is room."""
    generator = torch.Generator().manual_seed(count + width)
    codes, scale, zero_point, whole = reference.quantize_weight(torch.randn(count, width, generator=generator), spec)
    raw = torch.randint(0, 2 ** TensorSpec.parse(spec).format.bits, codes.shape, generator=generator)
    if codes.dtype == torch.uint8 or codes.dtype.is_floating_point:
        codes = raw.to(torch.uint8).view(codes.dtype)
    rows = reference.pack_rows(codes, spec)
    return rows, scale, zero_point if zero_point.numel() else None, whole if whole.numel() else None, width, spec


def check(indices: Tensor, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    got = ops.embedding_dequantize(indices, *arguments, dtype)
    rows, scale, zero_point, whole, width, spec = arguments
    want = reference.embedding_dequantize(indices, rows, scale, zero_point, whole, width, spec, dtype)
    assert_equal(got, want)
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())
    assert got.stride() == want.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [*SPECS, *MORE_SPECS])
def test_bit_equal_to_the_reference(spec: str, dtype: torch.dtype) -> None:
    for count, width in ((1, 1), (37, 31), (260, 160)):
        indices = torch.randint(0, count, (3, 50), generator=torch.Generator().manual_seed(1))
        check(indices, table(spec, count, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [*SPECS, *MORE_SPECS])
def test_all_rows_are_bit_equal_to_the_reference(spec: str, dtype: torch.dtype) -> None:
    for count, width in ((1, 1), (37, 9), (260, 160)):
        arguments: tuple[Any, ...] = (*table(spec, count, width), dtype)
        got, want = ops.decode_rows(*arguments), reference.decode_rows(*arguments)
        assert_equal(got, want)
        assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_of_any_shape(dtype: torch.dtype) -> None:
    arguments = table("int4/group32/affine/bf16", 20, 70)
    some = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(2)).to(dtype)
    for indices in (some, some.t(), some[1:, ::2], some[0, 0], some[:0], some[:, :0], some[0].expand(3, 6)):
        check(indices, arguments, torch.float32)


def test_tables_that_were_joined_keep_their_own_scales() -> None:
    rows, scale, zero_point, whole, *tail = table("fp4_e2m1/group16/e4m3", 20, 70)
    whole = whole * torch.rand(20, 1, generator=torch.Generator().manual_seed(3))
    check(torch.arange(20), (rows, scale, zero_point, whole, *tail), torch.float32)
    rows, scale, zero_point, whole, *tail = table("int8/tensor", 20, 70)
    check(torch.arange(20), (rows, torch.rand(20, 1), zero_point, whole, *tail), torch.float32)


@pytest.mark.parametrize("spec", ["fp4_e2m1/group32/e8m0", "fp4_e2m1/group16/e4m3"])
def test_every_byte_that_a_scale_can_be(spec: str) -> None:
    rows, scale, zero_point, whole, width, spec = table(spec, 256, 12)
    scale = torch.arange(256, dtype=torch.uint8).view(scale.dtype).view(256, 1)
    arguments: tuple[Any, ...] = (rows, scale, zero_point, whole, width, spec, torch.float32)
    assert_equal(ops.decode_rows(*arguments), reference.decode_rows(*arguments))


def test_a_scale_that_is_nan_gives_nan() -> None:
    rows, scale, *rest = table("int4/group32", 20, 70)
    scale[3, 1] = float("nan")
    got = ops.embedding_dequantize(torch.arange(20), rows, scale, *rest, torch.bfloat16)
    assert got[3, 32:64].isnan().all()
    assert int(got.isnan().sum()) == 32


@pytest.mark.parametrize("index", [20, -1, 2**31 - 1])
def test_an_index_outside_of_the_table_is_an_index_error(index: int) -> None:
    arguments = table("int8/channel", 20, 70)
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a table of 20 rows"):
            ops.embedding_dequantize(torch.tensor([3, index], dtype=dtype), *arguments, torch.float32)


def test_threads_do_not_change_a_bit() -> None:
    arguments = table("fp6_e3m2/channel", 50, 300)
    indices = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = ops.embedding_dequantize(indices, *arguments, torch.float16)
        torch.set_num_threads(3)
        assert_equal(ops.embedding_dequantize(indices, *arguments, torch.float16), want)
        wide: tuple[Any, ...] = (*table("fp6_e3m2/channel", 500, 300), torch.float16)
        assert_equal(ops.decode_rows(*wide), reference.decode_rows(*wide))
    finally:
        torch.set_num_threads(before)


def test_opcheck_with_the_kernel() -> None:
    arguments = (*table("int3/group5/shift", 20, 31), torch.bfloat16)
    torch.library.opcheck(ops.embedding_dequantize.default, (torch.arange(4), *arguments))
    torch.library.opcheck(ops.decode_rows.default, arguments)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(20, 69, dtype=torch.uint8), r"rows are uint8 \[N, 70\] for 70 codes"),
        (1, torch.ones(19, 1), "scale has 19 values of Float; 20 of Float are needed"),
        (1, torch.ones(20, 1, dtype=torch.float16), "scale has 20 values of Half; 20 of Float are needed"),
        (5, "int9/channel", "spec 'int9/channel' is not one that the kernels know"),
        (5, "int8/channel/affine", "spec 'int8/channel/affine' needs a zero_point"),
        (5, "int8/group16/e4m3", "scale has 20 values of Float; 100 of Float8_e4m3fn are needed"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(position: int, value: Any, words: str) -> None:
    arguments = list(table("int8/channel", 20, 70))
    arguments[position] = value
    with pytest.raises(RuntimeError, match="fxquant::embedding_dequantize: .*" + words):
        ops.embedding_dequantize(torch.arange(4), *arguments, torch.float32)
    with pytest.raises(RuntimeError, match="fxquant::decode_rows: .*" + words):
        ops.decode_rows(*arguments, torch.float32)


def test_indices_of_other_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="indices are Short; int32 and int64 are taken"):
        ops.embedding_dequantize(torch.ones(2, dtype=torch.int16), *table("int8/channel", 20, 70), torch.float32)
