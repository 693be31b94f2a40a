"""mx_mm by the interpreter: block-scaled floats on both sides, against float64.

The interpreter reads e4m3 scales as if they were e8m0 (see the README), and so do the products of NVFP4 wanted here:
they say that each scale meets its block. That it is read right is for the matrix instruction (`tests/kernels_compile`)
and a GPU (`tests/gpu`).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fxquant.numerics import decode, unpack_codes_rows
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.triton_kernels.mx_mm import MX_MM
from fxquant.triton_kernels.operands import LinearOperands, linear_operands
from tests.triton.helpers import U, assert_within, finished64, rounded, run_guarded

MXFP8, MXFP4, NVFP4 = (str(TensorSpec.parse(name)) for name in ("mxfp8", "mxfp4", "nvfp4"))
MXFP8_E5M2 = str(TensorSpec.parse("mxfp8_e5m2"))
SIDES = [(MXFP8, MXFP8), (MXFP8_E5M2, MXFP8), (MXFP4, MXFP4), (NVFP4, NVFP4), (MXFP8, MXFP4), (MXFP4, MXFP8)]
NAMES = [f"{x.split('/')[0]}-{w.split('/')[0]}-{w.split('/')[-1]}" for x, w in SIDES]
STRAIGHT = MX_MM.config(128, 16, 64, 2, 4, 2)
TURNED = MX_MM.config(16, 128, 64, 1, 4, 2)
ODD_SHAPES = ((1, 1, 1), (1, 33, 65), (17, 31, 63), (33, 130, 257), (0, 33, 65), (129, 17, 96))
SM100 = ARCHS["sm100"]


def decoded(codes: Tensor, scale: Tensor, whole: Tensor | None, text: str, width: int) -> Tensor:
    """[rows, width] in float64: code times scale times tensor scale, without a rounding."""
    spec = TensorSpec.parse(text if whole is None else "fp4_e2m1/group16/e8m0")
    scale = scale.view(spec.scale_dtype)
    plain = unpack_codes_rows(codes.view(torch.uint8), spec, width)
    value = decode(plain, scale, None, spec, torch.float32).double()
    return value if whole is None else value * whole.double()


def made_up(asked: Problem, *, bias: bool = True) -> LinearOperands:
    """Random operands; NVFP4's with tensor scales that keep the products away from subnormals."""
    made = linear_operands(asked, "cpu", bias=bias)
    if made.tensor_scale is None:
        return made
    whole = torch.full((1, 1), 2.0**3)
    return dataclasses.replace(made, tensor_scale=whole, x_tensor_scale=3 * whole)


def product64(operands: LinearOperands) -> tuple[Tensor, Tensor]:
    """(x times the weight, |x| times |weight|) in float64."""
    assert operands.x_scale is not None
    k = operands.in_features
    x = decoded(operands.x, operands.x_scale, operands.x_tensor_scale, operands.x_spec, k)
    w = decoded(operands.tiles, operands.scale, operands.tensor_scale, operands.spec, k)
    return x @ w.t(), x.abs() @ w.abs().t()


def assert_right(operands: LinearOperands, config: KernelConfig) -> None:
    """Products are exact in float32; K sums, two tensor scales and the bias round."""
    y64, size = product64(operands)
    steps = operands.in_features + 4
    bound = size * (steps * U / (1 - steps * U))
    y64 = finished64(y64, operands)
    y = run_guarded(MX_MM.run, operands, config)
    assert_within(y, y64, rounded(bound + U * y64.abs(), y64, operands.dtype))


def problem(shape: tuple[int, int, int], sides: tuple[str, str], dtype: str = "float16") -> Problem:
    return Problem("linear", *shape, sides[1], sides[0], dtype)


@pytest.mark.parametrize("sides", SIDES, ids=NAMES)
def test_is_within_the_bound_whichever_side_stands_left(sides: tuple[str, str]) -> None:
    made = made_up(problem((33, 130, 257), sides))
    for config in (STRAIGHT, TURNED):
        assert_right(made, config)


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("sides", [SIDES[0], SIDES[3]], ids=["mxfp8", "nvfp4"])
def test_odd_shapes(shape: tuple[int, int, int], sides: tuple[str, str]) -> None:
    made = made_up(problem(shape, sides, "float32"))
    for config in (STRAIGHT, TURNED):
        assert_right(made, config)


@pytest.mark.parametrize("sides", [SIDES[2], SIDES[3]], ids=["mxfp4", "nvfp4"])
def test_whole_numbers_are_exact(sides: tuple[str, str]) -> None:
    """Scales of 1 and codes of whole numbers: the sum is exact, and so is the result."""
    made = made_up(problem((5, 18, 128), sides, "float32"), bias=False)
    assert made.x_scale is not None

    def ones(t: Tensor) -> Tensor:
        return torch.full_like(t.view(torch.uint8), 127).view(t.dtype)

    plain = dataclasses.replace(made, scale=ones(made.scale), x_scale=ones(made.x_scale))
    if plain.tensor_scale is not None:
        plain = dataclasses.replace(plain, tensor_scale=torch.ones(1, 1), x_tensor_scale=torch.ones(1, 1))
    y64, _ = product64(plain)
    for config in (STRAIGHT, TURNED):
        assert torch.equal(MX_MM.run(plain, config).double(), y64)


def test_with_residual_and_activation_and_a_scale_for_each_joined_tensor() -> None:
    made = made_up(problem((9, 40, 64), (NVFP4, NVFP4)))
    assert made.tensor_scale is not None
    parts = made.tensor_scale * (1 + torch.arange(40)[:, None] % 3)
    residual = torch.randn(9, 80).half()[:, ::2]
    for activation in ("", "relu"):
        operands = dataclasses.replace(made, residual=residual, activation=activation, tensor_scale=parts)
        assert_right(operands, STRAIGHT)
        assert_right(operands, TURNED)


def test_rows_of_x_may_lie_apart() -> None:
    made = made_up(problem((9, 40, 64), (MXFP4, MXFP4)))
    wide = torch.full((9, 50), 0x77, dtype=torch.uint8)
    wide[:, 7:39] = made.x
    assert_right(dataclasses.replace(made, x=wide[:, 7:39]), TURNED)


@pytest.mark.slow
@pytest.mark.parametrize("sides", SIDES, ids=NAMES)
@pytest.mark.parametrize("m", [1, 7, 40, 130, 600])
def test_every_candidate(m: int, sides: tuple[str, str]) -> None:
    asked = problem((m, 140, 160), sides)
    made = made_up(asked)
    for config in MX_MM.candidates(asked, SM100):
        assert_right(made, config)


@pytest.mark.parametrize(
    ("weights", "activations", "arch", "words"),
    [
        ("mxfp8", "mxfp8", "sm90", "decoded instead"),
        ("mxfp8", "", "sm100", "both sides"),
        ("mxfp6", "mxfp6", "sm100", "fp6_e2m3"),
        ("nvfp4", "mxfp4", "sm100", "same blocks"),
        ("float8_e4m3fn/group16/e4m3", "nvfp4", "sm100", "both sides are fp4_e2m1"),
        ("fp4_e2m1/group64/e8m0", "fp4_e2m1/group64/e8m0", "sm100", "have 32 codes, not 64"),
        ("int8/channel", "int8/token", "sm100", "block-scaled floats"),
    ],
)
def test_says_what_it_does_not_take(weights: str, activations: str, arch: str, words: str) -> None:
    asked = problem((1, 16, 64), (activations, weights))
    assert words in MX_MM.why_not(asked, ARCHS[arch])


def test_takes_the_block_formats_on_sm100_and_leaves_a_native_shape_to_the_matrix_unit() -> None:
    for sides in SIDES:
        for m in (1, 16, 64, 65, 512, 4096):
            asked = problem((m, 4096, 4096), sides)
            assert not MX_MM.why_not(asked, SM100)
            for config in MX_MM.candidates(asked, SM100):
                left = config["BLOCK_M"] if config["BLOCK_M"] >= 128 else config["BLOCK_N"]
                right = config["BLOCK_N"] if config["BLOCK_M"] >= 128 else config["BLOCK_M"]
                assert left >= 128
                assert right >= 16
                assert config["num_warps"] in (4, 8)
