"""The CPU kernel of embedding_packed against its reference, bit for bit, in every spec."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.coded_problems import SPECS, coded
from tests.kernels.cpu_helpers import DTYPES, assert_equal, loaded, problem

ops = torch.ops.fxquant
# Only full panels, of K a multiple of 8 and not; rows only; both; with sums behind an int8 panel.
SIZES = ((128, 64), (64, 1001), (10, 70), (200, 72), (130, 260), (1, 1))


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    loaded()


def table(spec: str, count: int, width: int) -> tuple[Any, ...]:
    """packed, scale, zero_point, tensor_scale, count, width, spec: random codes."""
    if spec == "int8/channel":
        p = problem(count, width, seed=1, exact=False)
        return p.packed, p.scale, None, None, count, width, spec
    made = coded(spec, count, width, seed=1)
    return *made.packed, made.tensor_scale, count, width, made.text


def check(indices: Tensor, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    given: tuple[Any, ...] = (indices, *arguments, dtype)
    got, want = ops.embedding_packed(*given), reference.embedding_packed(*given)
    assert_equal(got, want)
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())
    assert got.stride() == want.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["int8/channel", *SPECS])
def test_bit_equal_to_the_reference(spec: str, dtype: torch.dtype) -> None:
    for count, width in SIZES:
        indices = torch.randint(0, count, (3, 50), generator=torch.Generator().manual_seed(2))
        check(indices, table(spec, count, width), dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("spec", ["int8/channel", "int4/group32/affine/bf16"])
def test_indices_of_any_shape(spec: str, dtype: torch.dtype) -> None:
    arguments = table(spec, 200, 72)
    some = torch.randint(0, 200, (4, 6), generator=torch.Generator().manual_seed(3)).to(dtype)
    for indices in (some, some.t(), some[1:, ::2], some[0, 0], some[:0], some[:, :0], some[0].expand(3, 6)):
        check(indices, arguments, torch.float32)


@pytest.mark.parametrize("spec", ["int8/channel", "int4/channel"])
@pytest.mark.parametrize("index", [200, -1, 2**31 - 1])
def test_an_index_outside_of_the_table_is_an_index_error(spec: str, index: int) -> None:
    words = f"fxquant::embedding_packed: index {index} is out of range for a table of 200 rows"
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(IndexError, match=words):
            ops.embedding_packed(torch.tensor([3, index], dtype=dtype), *table(spec, 200, 72), torch.float32)


@pytest.mark.parametrize("spec", ["int8/channel", "fp6_e3m2/channel"])
def test_threads_do_not_change_a_bit(spec: str) -> None:
    arguments, before = table(spec, 200, 300), torch.get_num_threads()
    indices = torch.randint(0, 200, (1000,), generator=torch.Generator().manual_seed(4))
    try:
        torch.set_num_threads(1)
        want = ops.embedding_packed(indices, *arguments, torch.float16)
        torch.set_num_threads(3)
        assert_equal(ops.embedding_packed(indices, *arguments, torch.float16), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spec", ["int8/channel", "int3/group5/shift"])
def test_opcheck_with_the_kernel(spec: str) -> None:
    torch.library.opcheck(ops.embedding_packed.default, (torch.arange(4), *table(spec, 70, 31), torch.bfloat16))


@pytest.mark.parametrize(
    ("spec", "position", "value", "words"),
    [
        ("int8/channel", 0, torch.zeros(7, dtype=torch.int8), r"packed is not what int8_pack makes of \[20, 70\]"),
        ("int4/channel", 0, torch.zeros(7, dtype=torch.uint8), r"packed is not what pack_panels makes of \[20, 70\]"),
        ("int8/channel", 1, torch.ones(19, 1), "scale has 19 values for 20 rows"),
        ("int8/channel", 1, torch.ones(20, 1, dtype=torch.float16), "scale is Half; scales are float32"),
        ("int4/channel", 1, torch.ones(19), "scale is not what pack_granules makes"),
        ("int8/channel", 6, "int9/channel", "spec 'int9/channel' is not"),
        ("int4/channel", 6, "int4/channel/affine", "needs a zero_point"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(spec: str, position: int, value: Any, words: str) -> None:
    arguments = list(table(spec, 20, 70))
    arguments[position] = value
    with pytest.raises(RuntimeError, match="fxquant::embedding_packed: .*" + words):
        ops.embedding_packed(torch.arange(4), *arguments, torch.float32)
    arguments = list(table(spec, 20, 70))
    with pytest.raises(RuntimeError, match="fxquant::embedding_packed: indices are Short"):
        ops.embedding_packed(torch.ones(2, dtype=torch.int16), *arguments, torch.float32)
