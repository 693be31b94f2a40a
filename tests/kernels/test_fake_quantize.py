"""The CPU kernel of fake_quantize against its reference, bit for bit: all bfloat16 values, float32 of any bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from fxquant.spec import TensorSpec
from tests.kernels.cpu_helpers import loaded

ops = torch.ops.fxquant
FORMATS = (
    "int8",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "fp6_e3m2",
    "fp6_e2m3",
    "fp5_e2m2",
    "fp4_e2m1",
    "fp3_e1m1",  # bias 0
    "fp8_e1m6",
    "fp8_e7m0",  # no mantissa: the even code is one of the exponent
    "fp3_e2m0",
    "fp8_e3m4",
)
GRANULES = (
    "token",
    "tensor",
    "sample",
    "group32",
    "group5",
    "group32/e8m0",
    "group7/e8m0",
    "group16/e4m3",
    "group7/e4m3",
)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    loaded()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_16_bits(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def all_bfloat16() -> Tensor:
    """Every finite value, neighbours in rows: each row is one binade or two."""
    values = every_16_bits(torch.bfloat16)
    return values[values.isfinite()][:65_024].view(-1, 64)


def mixed_bfloat16() -> Tensor:
    """The same values in random order: most of a row underflows."""
    values = all_bfloat16().flatten()
    return values[torch.randperm(values.numel(), generator=generator(1))].view(-1, 254)


def any_bits() -> Tensor:
    """float32 of random bits, NaN and infinity among them."""
    return torch.randint(-(2**31), 2**31, (300, 97), generator=generator(2)).to(torch.int32).view(torch.float32)


def any_magnitude() -> Tensor:
    powers = torch.exp2(torch.randint(-148, 120, (64, 1), generator=generator(3)).float())
    return torch.randn(64, 100, generator=generator(4)) * powers


def zeros_and_tiny() -> Tensor:
    return torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-38], [0.0, -0.0, 0.0, -0.0, 0.0, -0.0]])


def images() -> Tensor:
    return torch.randn(3, 5, 67, generator=generator(5))


INPUTS = {
    "all bfloat16": all_bfloat16,
    "mixed bfloat16": mixed_bfloat16,
    "all float16": lambda: every_16_bits(torch.float16).view(256, 256),
    "any bits": any_bits,
    "any magnitude": any_magnitude,
    "zeros and tiny": zeros_and_tiny,
    "images": images,
}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Signs of zeros too; NaN of any bits where NaN is wanted."""
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    raw = {4: torch.int32, 2: torch.int16}[got.element_size()]
    bad = ~((got.view(raw) == want.view(raw)) | (got.isnan() & want.isnan()))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} differ; at {at} {got[at].item()}, not {want[at].item()}"
        )


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("granules", GRANULES)
@pytest.mark.parametrize("number", FORMATS)
def test_bit_equal_to_the_reference(number: str, granules: str, name: str) -> None:
    x, spec = INPUTS[name](), f"{number}/{granules}"
    assert_same_bits(ops.fake_quantize(x, spec), reference.fake_quantize(x, spec))


@pytest.mark.parametrize("granules", GRANULES)
def test_the_reference_is_quantize_and_dequantize(granules: str) -> None:
    x, spec = images().bfloat16(), f"fp6_e2m3/{granules}"
    codes, scale, tensor_scale = reference.quantize_dynamic(x, spec)
    want = reference.dequantize(codes, scale, None, spec, x.dtype, tensor_scale if tensor_scale.numel() else None)
    assert_same_bits(ops.fake_quantize(x, spec), want)


@pytest.mark.parametrize("spec", ["int8/token", "float8_e4m3fn/tensor", "fp4_e2m1/sample", "mxfp8", "nvfp4"])
def test_x_of_any_layout(spec: str) -> None:
    x = torch.randn(4, 6, 5, 40, generator=generator(6))
    for view in (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(1, 2),
        x.transpose(2, 3),
        x[:, ::2, 1:4, 3:36],
        x[0, 0],
        x[..., 0, 0],
        x[0, 0, 0],
        x[:1].expand(3, 6, 5, 40),
        x[:, :0],
    ):
        assert_same_bits(ops.fake_quantize(view, spec), reference.fake_quantize(view, spec))


@pytest.mark.parametrize(("spec", "spoilt"), [("int8/token", 9), ("fp8/tensor", 45), ("mxfp4", 9), ("nvfp4", 45)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_granule_that_is_not_finite_is_nan_throughout(spec: str, spoilt: int, bad: float) -> None:
    x = torch.randn(5, 9, generator=generator(7))
    x[2, 8] = bad
    got = ops.fake_quantize(x, str(TensorSpec.parse(spec)))
    assert int(got.isnan().sum()) == spoilt
    assert got[2].isnan().all()


@pytest.mark.parametrize("spec", ["int8/token", "float8_e5m2/tensor", "int8/sample", "fp4_e2m1/group16/e4m3"])
def test_threads_do_not_change_a_bit(spec: str) -> None:
    x = torch.randn(7, 100, 333, generator=generator(8))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = ops.fake_quantize(x, spec)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same_bits(ops.fake_quantize(x, spec), want)
    finally:
        torch.set_num_threads(before)


def test_opcheck_with_the_kernel() -> None:
    torch.library.opcheck(ops.fake_quantize.default, (images().requires_grad_(), "int8/token"))
    torch.library.opcheck(ops.fake_quantize.default, (images().half(), "fp4_e2m1/group16/e4m3"))


@pytest.mark.parametrize(
    "spec", ["int4/token", "int8/channel", "int8/token/affine", "fp6_e3m2/block2x2", "int8/tensor/e4m3"]
)
def test_other_specs_are_refused(spec: str) -> None:
    words = "activations are int8 or a float format, symmetric, per tensor, token, sample or group"
    with pytest.raises(RuntimeError, match=words):
        ops.fake_quantize(images(), spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("granules", ["channel", "tensor", "group32", "group7"])
@pytest.mark.parametrize("number", ["int8", "float8_e4m3fn", "fp4_e2m1", "int4"])
def test_a_fake_quantized_weight_is_bit_equal_to_the_reference(number: str, granules: str, dtype: torch.dtype) -> None:
    w = torch.randn(9, 5, 3, 4, generator=generator(5)).mul_(torch.exp2(torch.arange(-140.0, 100, 27).view(9, 1, 1, 1)))
    w[4, 1], w[5, 0, 0, 0] = 0.0, torch.inf
    for shaped in (w, w.contiguous(memory_format=torch.channels_last), w[:, 1:, :, ::2], w[0, 0, 0], w[:0]):
        x, spec = shaped.to(dtype), f"{number}/{granules}"
        assert_same_bits(ops.fake_quantize_weight(x, spec), reference.fake_quantize_weight(x, spec))


@pytest.mark.parametrize("spec", ["fp4_e2m1/group32/e8m0", "fp4_e2m1/group16/e4m3", "fp6_e3m2/group7/e8m0"])
def test_other_scales_of_weights_are_bit_equal_to_the_reference(spec: str) -> None:
    w = torch.randn(9, 60, generator=generator(6))
    assert_same_bits(ops.fake_quantize_weight(w, spec), reference.fake_quantize_weight(w, spec))
