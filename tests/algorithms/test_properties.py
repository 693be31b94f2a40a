"""What holds for every algorithm, spec and tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.algorithms import quantize
from fxquant.algorithms.rows import CPU_BLOCK
from fxquant.errors import InvalidOption, ShapeMismatch
from fxquant.numerics import Codes
from tests.algorithms.cases import ALGORITHMS, SPECS, decoded, errors, parsed, plain_name, same, tensors


@pytest.mark.parametrize("text", SPECS)
def test_mse_never_has_a_larger_squared_error_than_the_plain_choice(text: str) -> None:
    spec, better = parsed(text), 0
    for name, x in tensors().items():
        plain, found = (errors(x, quantize(x, spec, a), spec, 2) for a in (plain_name(spec), "mse"))
        assert bool((found <= plain).all()), name
        better += int((found < plain).sum())
    assert better > 0 or text == "int4/group1"  # one value a granule is exact already


@pytest.mark.parametrize("text", SPECS)
def test_hqq_never_has_a_larger_mean_error_than_the_plain_choice(text: str) -> None:
    spec, better = parsed(text), 0
    for name, x in tensors().items():
        plain, found = (errors(x, quantize(x, spec, a), spec, 1) for a in (plain_name(spec), "hqq"))
        assert bool((found <= plain).all()), name
        better += int((found < plain).sum())
    assert better > 0 or text == "int4/group1"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("text", SPECS)
def test_shapes_and_dtypes_are_those_of_the_plain_choice_and_calls_repeat(text: str, algorithm: str) -> None:
    spec, x = parsed(text), tensors()["heavy tails"]
    plain, found = quantize(x, spec), quantize(x, spec, algorithm)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in plain]
    assert found.codes.is_contiguous()
    assert same(found, quantize(x, spec, algorithm))
    if spec.has_tensor_scale:
        assert torch.equal(found.tensor_scale, plain.tensor_scale)


def by_rows(text: str) -> bool:
    spec = parsed(text)
    return not spec.depends_on_whole and spec.granularity.kind != "block" and spec.granularity.axis == 0


@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
@pytest.mark.parametrize("text", [text for text in SPECS if by_rows(text)])
def test_rows_quantized_together_are_as_quantized_apart(text: str, algorithm: str) -> None:
    spec, x = parsed(text), tensors()["heavy tails"]
    whole = quantize(x, spec, algorithm)
    parts = [quantize(part, spec, algorithm) for part in (x[:1], x[1:18], x[18:])]
    joined = Codes(*(torch.cat([p[i] for p in parts]) if whole[i].numel() else whole[i] for i in range(4)))
    assert same(whole, joined)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("text", ["int4/group128/affine/bf16", "int8/channel", "int4/group100/shift", "mxfp4"])
def test_rows_of_several_blocks_are_as_quantized_apart(text: str, algorithm: str) -> None:
    spec = parsed(text)
    x = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(1))
    assert x.numel() > CPU_BLOCK
    whole, part = quantize(x, spec, algorithm), quantize(x[1020:1031], spec, algorithm)
    assert torch.equal(whole.codes[1020:1031].view(torch.uint8), part.codes.view(torch.uint8))
    assert torch.equal(whole.scale[1020:1031].view(torch.uint8), part.scale.view(torch.uint8))


@pytest.mark.parametrize(
    "text", ["int4/tensor", "int4/tensor/affine", "float8_e4m3fn/tensor", "int3/block600x700/shift"]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_granules_larger_than_a_block_are_never_worse(text: str, algorithm: str) -> None:
    spec, power = parsed(text), 2 if algorithm == "mse" else 1
    x = torch.randn(1200, 1400, generator=torch.Generator().manual_seed(2))
    plain, found = (errors(x, quantize(x, spec, a), spec, power) for a in ("auto", algorithm))
    # float8 resolves small values as well as large ones: of two million, a shorter range gains nothing.
    assert bool((found <= plain).all() if spec.format.kind == "float" else (found < plain).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("text", SPECS)
def test_a_granule_that_is_not_finite_is_as_in_the_plain_choice_and_alone(
    text: str, value: float, algorithm: str
) -> None:
    spec, x = parsed(text), tensors()["normal"]
    broken = x.clone()
    broken[5, 11] = value
    plain, found = quantize(broken, spec), quantize(broken, spec, algorithm)
    nan = (plain.tensor_scale if spec.has_tensor_scale else plain.scale).float().isnan().expand(found.scale.shape)
    assert bool(nan.any())
    assert torch.equal(decoded(found, spec).isnan(), decoded(plain, spec).isnan())
    assert torch.equal(found.scale[~nan].float(), quantize(x, spec, algorithm).scale[~nan].float())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("text", SPECS)
def test_zeros_are_as_in_the_plain_choice(text: str, algorithm: str) -> None:
    spec, x = parsed(text), torch.zeros(24, 70)
    assert same(quantize(x, spec, algorithm), quantize(x, spec))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
@pytest.mark.parametrize("text", SPECS)
def test_empty_tensors_have_empty_codes(text: str, shape: tuple[int, int], algorithm: str) -> None:
    spec = parsed(text)
    found = quantize(torch.empty(shape), spec, algorithm)
    assert found.codes.shape == shape
    assert list(found.scale.shape) == spec.granularity.scale_shape(shape)
    assert same(found, quantize(torch.empty(shape), spec))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("text", ["int4/group32/affine/bf16", "int8/channel", "int4/channel1", "int4/tensor", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(text: str, dtype: torch.dtype, algorithm: str) -> None:
    spec, x = parsed(text), tensors()["normal"].to(dtype)
    assert same(quantize(x, spec, algorithm), quantize(x.float(), spec, algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("text", ["int4/group32/affine/bf16", "int8/channel", "int4/tensor", "int4/block8x16"])
def test_strides_do_not_count(text: str, algorithm: str) -> None:
    spec, x = parsed(text), tensors()["normal"]
    assert same(quantize(x.t().contiguous().t(), spec, algorithm), quantize(x, spec, algorithm))
    wide = torch.zeros(24, 140)
    wide[:, ::2] = x
    assert same(quantize(wide[:, ::2], spec, algorithm), quantize(x, spec, algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(70,), (3, 8, 70), (2, 3, 4, 70)])
@pytest.mark.parametrize("text", ["int4/group32/affine", "int8/channel", "int4/channel-1", "int4/token", "int4/tensor"])
def test_any_number_of_dimensions(text: str, shape: tuple[int, ...], algorithm: str) -> None:
    spec, power = parsed(text), 2 if algorithm == "mse" else 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    plain, found = (errors(x, quantize(x, spec, a), spec, power) for a in ("auto", algorithm))
    assert bool((found <= plain).all())


class LargestFloat32(TorchDispatchMode):
    """How many float32 values the largest tensor that any operation returned has, views of the input aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.dtype == torch.float32:
                self.numel = max(self.numel, t.numel())
        return result


@pytest.mark.parametrize("algorithm", ["auto", "mse", "hqq"])
@pytest.mark.parametrize("text", ["int8/channel", "int4/group128/affine/bf16", "int4/tensor", "float8_e4m3fn/channel"])
def test_a_weight_in_half_precision_is_never_widened_as_a_whole(text: str, algorithm: str) -> None:
    x = torch.randn(1536, 1024, dtype=torch.bfloat16)
    assert x.numel() > CPU_BLOCK
    with LargestFloat32() as largest:
        quantize(x, parsed(text), algorithm)
    assert 0 < largest.numel <= CPU_BLOCK


@pytest.mark.parametrize(
    ("text", "algorithm", "reason"),
    [
        ("int4/group32/affine", "absmax", "symmetric"),
        ("int4/group32/shift", "absmax", "symmetric"),
        ("int4/group32", "minmax", "affine"),
        ("mxfp4", "minmax", "affine"),
        ("int4/group32", "hqqq", "did you mean 'hqq'"),
    ],
)
def test_an_algorithm_that_does_not_fit_is_an_error_that_says_so(text: str, algorithm: str, reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        quantize(torch.ones(2, 32), parsed(text), algorithm)


@pytest.mark.parametrize("text", SPECS)
def test_auto_is_the_plain_choice(text: str) -> None:
    spec, x = parsed(text), tensors()["heavy tails"]
    assert same(quantize(x, spec), quantize(x, spec, plain_name(spec)))


@pytest.mark.parametrize("algorithm", ["auto", "mse", "hqq"])
@pytest.mark.parametrize(
    ("x", "text", "words"),
    [
        (torch.ones(2, 3, 4), "int8/channel3", "granularity channel3 needs an axis 3"),
        (torch.ones(2, 3, 4), "float8_e4m3fn/block2x2", "a block needs a matrix"),
        (torch.tensor(1.0), "int4/group32", "needs at least one dimension"),
        (torch.ones(2, 3, dtype=torch.int32), "int8/channel", "a float dtype is needed"),
        (torch.ones(2, 3, dtype=torch.complex64), "int8/channel", "a float dtype is needed"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(x: Tensor, text: str, words: str, algorithm: str) -> None:
    with pytest.raises(ShapeMismatch, match=words):
        quantize(x, parsed(text), algorithm)
