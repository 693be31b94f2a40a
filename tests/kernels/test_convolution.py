"""The convolution kernels of the CPU: int8 ones bit-equal to the reference, float ones within the derived bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.kernels.coded_problems import FEW_SPECS, SPECS
from tests.kernels.conv_problems import SHAPES, ConvProblem, Shape, layouts
from tests.kernels.cpu_helpers import (
    DTYPES,
    SECOND_ORDER,
    SMALLEST_HALF_STEP,
    U_OUT,
    U,
    assert_equal,
    assert_within,
)

ops = torch.ops.fxquant


pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_bit_equal_to_the_reference(isa: int, shape: Shape, dtype: torch.dtype) -> None:
    p = ConvProblem(shape, dtype)
    for bias in (None, p.bias):
        arguments = p.int8(bias)
        for x in layouts(p.x):
            want = reference.int8_conv_dynamic(x, *arguments)
            got = ops.int8_conv_dynamic(x, *arguments, isa)
            assert_equal(got, want)
            assert got.stride() == want.stride()


def test_int8_against_float64() -> None:
    """Powers of two as scales: the definition, by a convolution of torch's, without a rounding."""
    shape = Shape(2, 5, 9, (12, 11), (3, 3), (2, 1), (1, 2), (1, 1))
    p = ConvProblem(shape)
    x = torch.randint(-127, 128, p.x.shape, generator=torch.Generator().manual_seed(1)).float()
    x[:, 0, 0, 0] = 127
    codes = torch.randint(-127, 128, p.weight.shape, generator=torch.Generator().manual_seed(2)).to(torch.int8)
    scale = torch.full((shape.out, 1), 2.0**-5)
    got = ops.int8_conv_dynamic(x / 64, reference.int8_pack(codes), scale, None, shape.kernel, *shape.moves)
    assert_equal(got, (p.float64(x.double(), codes.double()) * 2.0**-11).float())


def check_within(p: ConvProblem, spec: str, x: Tensor, bias: Tensor | None, got: Tensor) -> None:
    """gamma_K+1 |x| * |w| for the sum and a tensor scale, u for the bias, u_out for the output."""
    weight = p.decoded(spec).double()
    product = p.float64(x.double(), weight)
    magnitude = p.float64(x.double().abs(), weight.abs())
    want = product if bias is None else product + bias.double().view(-1, *[1] * (x.dim() - 2))
    k = p.shape.features + 2  # decoding under a tensor scale and that scale in the end round once each
    bound = k * U / (1 - k * U) * magnitude + (U + U_OUT[x.dtype]) * want.abs()
    assert got.dtype == x.dtype
    assert_within(got, want, SECOND_ORDER * bound + SMALLEST_HALF_STEP[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_only_stays_in_the_derived_bound(isa: int, shape: Shape, dtype: torch.dtype) -> None:
    p = ConvProblem(shape, dtype)
    for number, spec in enumerate(FEW_SPECS):
        bias = p.bias if number % 2 else None
        arguments = p.coded(spec, bias)
        for x in layouts(p.x):
            if x.shape == p.x.shape and x.numel():
                got = ops.conv_weight_only(x, *arguments, isa)
                check_within(p, spec, x, bias, got)
                assert got.stride() == reference.conv_weight_only(x, *arguments).stride()


@pytest.mark.parametrize("spec", SPECS)
def test_every_format(spec: str) -> None:
    for channels in (5, 8):  # rows alone; a full panel and a part of one
        p = ConvProblem(Shape(1, channels, 66, (8, 7), (3, 3), (1, 1), (1, 1), (1, 1)))
        check_within(p, spec, p.x, p.bias, ops.conv_weight_only(p.x, *p.coded(spec, p.bias)))
        check_within(p, spec, p.x, p.bias, reference.conv_weight_only(p.x, *p.coded(spec, p.bias)))


BIG = (
    Shape(3, 40, 6, (150, 160), (3, 3), (1, 1), (1, 1), (1, 1)),  # a sample is laid out in parts
    Shape(5, 9, 6, (90, 100), (3, 3), (2, 2), (1, 1), (1, 1)),  # several samples at a time
    Shape(1, 16, 70, (70_000,), (3,), (1,), (1,), (1,)),
    Shape(2, 40, 6, (170, 160), (1, 1), (1, 1), (0, 0), (1, 1)),
    Shape(1, 16, 6, (20, 60, 60), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
)


@pytest.mark.parametrize("shape", BIG, ids=str)
def test_more_than_one_pass(shape: Shape) -> None:
    """Inputs beyond what is laid out at a time; exact sums, so that float kernels may be compared bit for bit too."""
    p = ConvProblem(shape)
    int8, spec = p.int8(p.bias), "int8/channel"
    codes = torch.ones(shape.out, shape.features, dtype=torch.int8)
    codes[:, ::3] = -2
    packed = reference.pack_panels(codes, spec)
    ones = reference.pack_granules(torch.ones(shape.out, 1), spec, shape.out, shape.features)
    whole = torch.round(p.x * 4)
    for x in [t for t in layouts(whole) if t.shape == whole.shape]:
        assert_equal(ops.int8_conv_dynamic(x, *int8), reference.int8_conv_dynamic(x, *int8))
        got = ops.conv_weight_only(x, packed, ones, None, None, None, shape.out, shape.kernel, *shape.moves, spec)
        assert_equal(got, p.float64(x, codes.float()))


def test_a_sample_that_is_not_finite_is_nan_and_leaves_others_alone(isa: int) -> None:
    p = ConvProblem(Shape(3, 4, 5, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1)))
    arguments = p.int8(p.bias)
    clean = ops.int8_conv_dynamic(p.x, *arguments, isa)
    p.x[1, 2, 3, 4] = float("inf")
    got = ops.int8_conv_dynamic(p.x, *arguments, isa)
    assert got[1].isnan().all()
    assert_equal(got[::2], clean[::2])


def test_a_scale_that_is_nan_gives_nan(isa: int) -> None:
    p = ConvProblem(Shape(1, 4, 70, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1)))
    packed, scale, *rest = p.int8(None)
    scale[66] = float("nan")
    got = ops.int8_conv_dynamic(p.x, packed, scale, *rest, isa)
    assert got[:, 66].isnan().all()
    assert got.isnan().sum() == got[:, 66].numel()
    p.weight[66, 1] = float("nan")
    got = ops.conv_weight_only(p.x, *p.coded("int4/group32", None), isa)
    assert got[:, 66].isnan().all()
    assert got[:, :66].isfinite().all()


def test_threads_do_not_change_a_bit() -> None:
    p = ConvProblem(Shape(3, 20, 130, (30, 31), (3, 3), (1, 1), (1, 1), (1, 1)))
    int8, coded = p.int8(p.bias), p.coded("int4/group32/affine/bf16", p.bias)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((ops.int8_conv_dynamic(p.x, *int8), ops.conv_weight_only(p.x, *coded)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_equal(other[0], found[0][0])
        assert_equal(other[1], found[0][1])


def test_rows_that_threads_widen_do_not_run_into_each_other() -> None:
    """1x1 over channels-last bfloat16: x is widened by whole vectors, and a row of 3 channels is shorter than one."""
    shape = Shape(2, 3, 33, (200, 200), (1, 1), (1, 1), (0, 0), (1, 1))
    p = ConvProblem(shape, torch.bfloat16)
    x, arguments = p.x.contiguous(memory_format=torch.channels_last), p.coded("int4/channel", None)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            found.append(ops.conv_weight_only(x, *arguments))
    finally:
        torch.set_num_threads(before)
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_with_the_kernels(layout: str) -> None:
    p = ConvProblem(Shape(2, 4, 5, (6, 7), (3, 3), (1, 2), (1, 1), (1, 1)))
    x = p.x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else p.x
    torch.library.opcheck(ops.int8_conv_dynamic.default, (x.requires_grad_(), *p.int8(p.bias)))
    torch.library.opcheck(ops.conv_weight_only.default, (x, *p.coded("int4/group5/affine", p.bias)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stride": (0, 1)}, "kernel, stride and dilation are at least 1 and padding at least 0"),
        ({"stride": (1,)}, "x has 4 dimensions and the kernel 2"),
        ({"kernel": (9, 3)}, "the kernel reaches over an input of size 6 with padding 1"),
        ({"channels": 5}, r"packed is not what int8_pack makes of \[5, 45\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    p = ConvProblem(Shape(2, 4, 5, (6, 7), (3, 3), (1, 2), (1, 1), (1, 1)))
    packed, scale, bias, kernel, stride, *rest = p.int8(None)
    x = torch.ones(2, change.get("channels", 4), 6, 7)
    with pytest.raises(RuntimeError, match=words):
        ops.int8_conv_dynamic(x, packed, scale, bias, change.get("kernel", kernel), change.get("stride", stride), *rest)
