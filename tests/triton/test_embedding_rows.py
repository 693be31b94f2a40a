"""embedding_rows by the interpreter: bit-equal to the rows of the decoded table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import Codes, decode, pack_codes_rows
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, Problem
from fxquant.triton_kernels.embedding_rows import EMBEDDING_ROWS
from fxquant.triton_kernels.launching import guarded
from fxquant.triton_kernels.operands import EmbeddingOperands

# Every width, every scheme, every granularity, every kind of scale.
SPECS = (
    "int8/channel", "int8/tensor", "int7/channel", "int6/group32/affine/bf16", "int5/group24", "int3/block16x32",
    "int4/group128/affine/bf16", "int2/group32/affine", "int8/group16/shift/bf16", "int4/group32/shift",
    "int8/channel/affine", "int4/channel-1", "float8_e4m3fn/channel", "float8_e5m2/tensor", "float8_e4m3fnuz/channel",
    "float8_e5m2fnuz/group64", "fp6_e3m2/channel", "fp5_e2m2/group16", "fp4_e2m1/token", "fp3_e1m1/channel",
    "mxfp8", "mxfp6", "mxfp4", "nvfp4",
)  # fmt: skip
SMALL = EMBEDDING_ROWS.config(4, 64, 1)
INDICES = torch.tensor([3, 0, 36, 3, 17, 35, 20])


def table(spec: str, rows: int = 37, width: int = 150, seed: int = 0) -> Codes:
    torch.manual_seed(seed)
    return quantize(torch.randn(rows, width), TensorSpec.parse(spec))


def operands(codes: Codes, spec: str, indices: Tensor, dtype: torch.dtype = torch.float16) -> EmbeddingOperands:
    parsed = TensorSpec.parse(spec)
    packed, width = pack_codes_rows(codes.codes, parsed), codes.codes.shape[1]
    zero, whole = codes.zero_point, codes.tensor_scale
    return EmbeddingOperands(indices, packed, codes.scale, width, spec, dtype, zero, whole)


def wanted(codes: Codes, spec: str, indices: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    values = decode(codes.codes, codes.scale, codes.zero_point, TensorSpec.parse(spec), dtype, codes.tensor_scale)
    return values[indices.long()]


@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_those_of_the_decoded_table(spec: str) -> None:
    codes = table(spec)
    for dtype in (torch.float16, torch.float32):
        with guarded():
            got = EMBEDDING_ROWS.run(operands(codes, spec, INDICES, dtype), SMALL)
        assert got.dtype == dtype
        assert torch.equal(got, wanted(codes, spec, INDICES, dtype))


@pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("spec", ["float8_e4m3fn/channel", "float8_e5m2/channel", "float8_e4m3fnuz/channel", "mxfp8"])
def test_every_code_and_every_scale_of_a_byte(spec: str) -> None:
    parsed, every = TensorSpec.parse(spec), torch.arange(256).to(torch.uint8)
    scale = every[:, None].repeat(1, 8).view(parsed.scale_dtype) if spec == "mxfp8" else torch.ones(256, 1)
    codes = Codes(every.repeat(256, 1).view(parsed.code_dtype), scale, torch.empty(0), torch.empty(0))
    indices = torch.arange(256)
    got = EMBEDDING_ROWS.run(operands(codes, spec, indices, torch.float32), EMBEDDING_ROWS.config(64, 256, 1))
    torch.testing.assert_close(got, wanted(codes, spec, indices, torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", ["int8/tensor", "nvfp4"])
def test_tables_that_were_joined_have_one_number_a_row(spec: str) -> None:
    codes = table(spec)
    parts = torch.arange(37)[:, None] % 3 + 1.0
    codes = codes._replace(scale=codes.scale * parts) if spec == "int8/tensor" else codes._replace(tensor_scale=parts)
    got = EMBEDDING_ROWS.run(operands(codes, spec, INDICES), SMALL)
    assert torch.equal(got, wanted(codes, spec, INDICES))


@pytest.mark.parametrize(("rows", "width", "count"), [(1, 1, 1), (5, 33, 0), (3, 257, 9), (2, 64, 17)])
def test_odd_shapes(rows: int, width: int, count: int) -> None:
    indices = torch.arange(count).int() % rows
    for spec in ("int8/channel", "int4/group32", "int3/channel"):
        codes = table(spec, rows, width)
        with guarded():
            got = EMBEDDING_ROWS.run(operands(codes, spec, indices), SMALL)
        assert torch.equal(got, wanted(codes, spec, indices))


def test_a_row_that_is_not_there_is_nan() -> None:
    codes = table("int4/group32")
    got = EMBEDDING_ROWS.run(operands(codes, "int4/group32", torch.tensor([-1, 0, 37, 2**40])), SMALL)
    assert got[[0, 2, 3]].isnan().all()
    assert got[1].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("spec", SPECS)
def test_every_candidate(arch: str, spec: str) -> None:
    for width in (40, 1000):
        codes = table(spec, width=width)
        problem = Problem("embedding", len(INDICES), 37, width, spec, "", "float16")
        for config in EMBEDDING_ROWS.candidates(problem, ARCHS[arch]):
            got = EMBEDDING_ROWS.run(operands(codes, spec, INDICES), config)
            assert torch.equal(got, wanted(codes, spec, INDICES))


def test_says_that_it_is_no_linear() -> None:
    linear = Problem("linear", 1, 1, 1, "int8/channel", "", "float16")
    assert "linear" in EMBEDDING_ROWS.why_not(linear, ARCHS["sm90"])
    assert not EMBEDDING_ROWS.why_not(dataclasses.replace(linear, op="embedding"), ARCHS["sm90"])
