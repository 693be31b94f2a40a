"""Packing and decoding weights of any format: the kernels give the reference's bits."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant import numerics
from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.kernels.coded_problems import FEW_SPECS, FLOAT_NAMES, SPECS, Coded, coded, opchecks
from tests.kernels.cpu_helpers import DTYPES, assert_equal, loaded

ops = torch.ops.fxquant
SHAPES = [(1, 1), (65, 31), (70, 160), (0, 9), (128, 264), (67, 449)]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    loaded()


@pytest.mark.parametrize("text", SPECS)
def test_packing_equals_the_reference(text: str) -> None:
    for shape in SHAPES:
        codes = coded(text, *shape, seed=1).codes
        assert torch.equal(ops.pack_panels(codes, text), reference.pack_panels(codes, text))
    codes = coded(text, 70, 33, seed=1).codes
    assert torch.equal(ops.pack_panels(codes.t().contiguous().t(), text), reference.pack_panels(codes, text))


@pytest.mark.parametrize("text", SPECS)
def test_decoding_gives_the_bits_of_numerics(text: str) -> None:
    for shape in SHAPES:
        p = coded(text, *shape, seed=2)
        for dtype in DTYPES:
            want = numerics.decode(p.codes, p.scale, p.zero_point, p.spec, dtype, p.tensor_scale)
            for op in (ops.decode_weight, reference.decode_weight):
                got = op(*p.packed, p.tensor_scale, *shape, text, dtype)
                assert_equal(got, want)
                assert torch.equal(got.signbit(), want.signbit())


@pytest.mark.parametrize("k", [1, 31, 160, 1000])
@pytest.mark.parametrize("group", [1, 2, 3, 6, 13, 32, 128, 4096])
def test_groups_of_any_size(k: int, group: int) -> None:
    p = coded(f"int5/group{group}/affine", 66, k, seed=3)
    want = numerics.decode(p.codes, p.scale, p.zero_point, p.spec, torch.float32)
    assert_equal(ops.decode_weight(*p.packed, None, 66, k, p.text, torch.float32), want)


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_every_code_decodes_to_its_value(name: str) -> None:
    spec = TensorSpec.parse(f"{name}/channel")
    values = numerics.code_values(spec.format)
    codes = torch.arange(len(values), dtype=torch.uint8).view(spec.code_dtype)[None]
    p = Coded(spec, codes, torch.ones(1, 1), None, None, torch.zeros(1))
    got = ops.decode_weight(*p.packed, None, 1, len(values), p.text, torch.float32)[0]
    assert_equal(got, values)
    assert torch.equal(got.signbit()[~got.isnan()], values.signbit()[~values.isnan()])


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
def test_every_scale_code_is_read(scale: str) -> None:
    """All 256, subnormals and NaN too, also on a thread that flushes denormals where a float32 can hold the scale."""
    spec = TensorSpec.parse(f"fp4_e2m1/group8/{scale}")
    codes = torch.full((256, 8), 2, dtype=torch.uint8)  # the code of 1.0
    scales = torch.arange(256, dtype=torch.uint8).view(spec.scale_dtype)[:, None]
    whole = torch.ones(1, 1) if scale == "e4m3" else None
    p = Coded(spec, codes, scales, None, whole, torch.zeros(256))
    want = scales.float().expand(-1, 8)
    assert_equal(ops.decode_weight(*p.packed, whole, 256, 8, p.text, torch.float32), want)
    if scale == "e4m3" and torch.set_flush_denormal(True):
        try:
            assert_equal(ops.decode_weight(*p.packed, whole, 256, 8, p.text, torch.float32), want)
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("text", ["int4/group8", "int4/group8/affine", "fp6_e3m2/group8", "float8_e5m2/group8"])
def test_nan_and_zero_scales(text: str) -> None:
    p = coded(text, 66, 40, seed=4)
    p.scale[3, 1], p.scale[65, 4], p.scale[7] = math.nan, math.nan, 0.0
    got = ops.decode_weight(*p.packed, None, 66, 40, text, torch.float32)
    wrong = torch.zeros(66, 40, dtype=torch.bool)
    wrong[3, 8:16] = wrong[65, 32:] = True
    assert torch.equal(got.isnan(), wrong)
    assert torch.equal(got[7].abs(), torch.zeros(40))


@pytest.mark.parametrize("text", FEW_SPECS)
def test_opcheck_with_the_kernels(text: str) -> None:
    p = coded(text, 70, 33, seed=5)
    for op, arguments in (
        (ops.pack_panels.default, (p.codes, text)),
        (ops.decode_weight.default, (*p.packed, p.tensor_scale, 70, 33, text, torch.bfloat16)),
    ):
        torch.library.opcheck(op, arguments, test_utils=opchecks(arguments))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("int9/channel", "spec 'int9/channel' is not format/granularity"),
        ("int4/group0", "spec 'int4/group0' is not"),
        ("fp4_e2m1/channel/affine", "has a zero point, which needs an integer format"),
        ("int8/channel1", "has no granularity of a packed weight"),
        ("int8/channel", r"packed is not what pack_panels makes of \[70, 33\]: uint8 \[2310\] is needed"),
        ("int4/group32", r"scale is not what pack_granules makes for \[70, 33\]: Float \[140\]"),
        ("int4/channel/affine", "needs a zero_point; none was given"),
        ("int4/channel/bf16", r"scale is not what pack_granules makes for \[70, 33\]: BFloat16 \[70\]"),
    ],
)
def test_bad_arguments_are_named(spec: str, words: str) -> None:
    p = coded("int4/channel", 70, 33, seed=6)
    with pytest.raises(RuntimeError, match=words):
        ops.decode_weight(*p.packed, None, 70, 33, spec, torch.float32)
