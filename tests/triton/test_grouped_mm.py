"""Products of codes by groups along K, by Triton's interpreter: exact sums, derived bounds, every candidate."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fxquant.spec import PRESETS, TensorSpec
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.triton_kernels import kernels_for
from fxquant.triton_kernels.grouped_mm import GROUPED_MM
from fxquant.triton_kernels.operands import LinearOperands
from tests.triton.helpers import (
    ODD_SHAPES,
    U,
    assert_exact,
    assert_within,
    code_values,
    finished32,
    finished64,
    operands_of,
    problem,
    rounded,
    run_guarded,
    strided,
    weight64,
)

INTEGERS = (
    "int2/group32/affine/bf16",
    "int3/group64",
    "int4/group32/bf16",
    "int4/group128/affine/bf16",
    "int4/channel",
    "int4/group512",
    "int5/channel/affine",
    "int6/group16",
    "int7/group128/affine",
    "int8/group128",
    "int8/group64/affine",
    "int8/channel/affine",
)
FLOATS = (
    ("float8_e4m3fn/block128x128", "float8_e4m3fn/group128"),
    ("float8_e4m3fn/group64", "float8_e5m2/token"),
    ("float8_e5m2/group32", "float8_e4m3fn/tensor"),
    ("float8_e4m3fn/group256", "float8_e4m3fn/group256"),
)
LONG = (33, 70, 600)  # several steps, and a last one that is not full


def config_for(p: Problem, arch: str = "sm90", **changes: int) -> KernelConfig:
    """The first guess for that architecture, with some values changed."""
    return changed(GROUPED_MM.heuristic(p, ARCHS[arch]), **changes)


def changed(config: KernelConfig, **changes: int) -> KernelConfig:
    return KernelConfig.of(config.kernel, **{**config.meta, **changes})


def of_powers(operands: LinearOperands) -> LinearOperands:
    """The same codes under scales that are powers of two: no product of a scale is rounded."""
    scale = 2.0 ** -torch.randint(4, 9, operands.scale.shape)
    assert operands.x_scale is not None
    x_scale = 2.0 ** -torch.randint(4, 9, operands.x_scale.shape)
    return dataclasses.replace(operands, scale=scale.to(operands.scale.dtype), x_scale=x_scale.float(), bias=None)


def x64(operands: LinearOperands) -> Tensor:
    """x [M, K] in float64."""
    spec, scale = TensorSpec.parse(operands.x_spec), operands.x_scale
    assert scale is not None
    values, size = code_values(operands.x, spec), spec.granularity.size or operands.in_features
    return values * scale.double().repeat_interleave(size, 1)[:, : values.shape[1]]


def y64(operands: LinearOperands) -> Tensor:
    return x64(operands) @ weight64(operands).t()


def bound(operands: LinearOperands) -> Tensor:
    """Sums of integers are exact. A product of granule, scale and x_scale has four roundings, their sum one each, bias,
    residual and activation four more; products of floats one each besides."""
    spec, k = TensorSpec.parse(operands.spec), operands.in_features
    terms = k if spec.format.kind == "float" else (k - 1) // (spec.granularity.size or k) + 1 if k else 0
    size = x64(operands).abs() @ weight64(operands).abs().t()
    return (terms + 12) * U * (size + finished64(y64(operands), operands).abs())


@pytest.mark.parametrize("weights", INTEGERS)
def test_integer_sums_are_exact(weights: str) -> None:
    for shape in ODD_SHAPES:
        p = problem(shape, weights, "int8/token", "float32")
        operands = of_powers(operands_of(p))
        y = run_guarded(GROUPED_MM.run, operands, config_for(p))
        assert_exact(y, finished32(y64(operands).float(), operands))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("weights", ["int4/group32/bf16", "int4/group128/affine/bf16", "int8/channel/affine"])
def test_long_sums_are_exact(weights: str, arch: str, split: int) -> None:
    p = problem(LONG, weights, "int8/tensor", "float16")
    operands = of_powers(operands_of(p))
    y = run_guarded(GROUPED_MM.run, operands, config_for(p, arch, SPLIT_K=split))
    assert_exact(y, finished32(y64(operands).float(), operands))


@pytest.mark.parametrize("shape", [(0, 33, 65), (17, 31, 63), LONG])
@pytest.mark.parametrize("weights", ["int2/group32/affine/bf16", "int4/group32/bf16", "int8/group64/affine"])
def test_rounding_of_integers(weights: str, shape: tuple[int, int, int]) -> None:
    p = problem(shape, weights, "int8/token", "float16")
    operands = operands_of(p, residual=True, activation="silu")
    y = run_guarded(GROUPED_MM.run, strided(operands), config_for(p, SPLIT_K=2))
    want = finished64(y64(operands), operands)
    assert_within(y, want, rounded(bound(operands), want, torch.float16))


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize(("weights", "activations"), FLOATS)
def test_rounding_of_floats(weights: str, activations: str, arch: str) -> None:
    for shape in ((17, 31, 63), (70, 33, 600)):
        p = problem(shape, weights, activations, "float32")
        operands = operands_of(p)
        y = run_guarded(GROUPED_MM.run, operands, config_for(p, arch, SPLIT_K=2))
        assert_within(y, finished64(y64(operands), operands), bound(operands))


def test_x_has_groups_too() -> None:
    p = problem(LONG, "int8/group128", "int8/group128", "float32")
    operands = operands_of(p)
    y = run_guarded(GROUPED_MM.run, operands, config_for(p))
    assert_within(y, finished64(y64(operands), operands), bound(operands))


def test_the_largest_codes_do_not_overflow_a_biased_sum() -> None:
    p = problem((16, 32, 256), "int4/group128/affine/bf16", "int8/token", "float32")
    operands = of_powers(operands_of(p))
    assert operands.zero_point is not None
    extreme = dataclasses.replace(
        operands,
        x=torch.full_like(operands.x, -127),
        tiles=torch.full_like(operands.tiles, 0xFF),
        zero_point=torch.zeros_like(operands.zero_point),
    )
    y = run_guarded(GROUPED_MM.run, extreme, config_for(p, "sm80", BIASED=1))
    assert_exact(y, finished32(y64(extreme).float(), extreme))


@pytest.mark.parametrize(
    ("weights", "activations", "words"),
    [
        ("int4/group128/affine/bf16", "", "x must be quantized"),
        ("int8/channel", "int8/token", "scaled_mm has it"),
        ("float8_e4m3fn/channel", "float8_e4m3fn/token", "scaled_mm has it"),
        ("int4/group48", "int8/token", "powers of two"),
        ("int4/group128/shift", "int8/token", "symmetric or affine"),
        ("mxfp8", "mxfp8", "float32 or bfloat16"),
        ("int4/group64", "int8/group32", "weight's groups"),
        ("int4/group64", "float8_e4m3fn/token", "multiplied with int8"),
    ],
)
def test_declines_with_a_reason(weights: str, activations: str, words: str) -> None:
    p = problem((16, 64, 256), weights, activations)
    assert words in GROUPED_MM.why_not(p, ARCHS["sm90"])


def test_is_what_int4dq_gets() -> None:
    p = problem((16, 64, 256), str(PRESETS["int4dq"].weights), "int8/token", "bfloat16")
    assert GROUPED_MM in kernels_for(p, ARCHS["sm90"])


def candidates(weights: str, activations: str) -> dict[tuple[tuple[str, int], ...], KernelConfig]:
    """Of all architectures and numbers of rows, each once that differs in what the interpreter sees."""
    unseen = ("WORDS", "num_warps", "num_stages")
    found: dict[tuple[tuple[str, int], ...], KernelConfig] = {}
    for arch in ARCHS.values():
        for m in (1, 32, 64, 4096):
            configs = GROUPED_MM.candidates(problem((m, 4096, 4096), weights, activations), arch)
            assert 1 <= len(configs) <= 10  # one, where of a wide format nothing else fits
            found |= {tuple(item for item in config.values if item[0] not in unseen): config for config in configs}
    assert len(found) > 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "activations"), [*((weights, "int8/token") for weights in INTEGERS), *FLOATS])
def test_every_candidate(weights: str, activations: str) -> None:
    operands = operands_of(problem((17, 40, 600), weights, activations, "float32"))
    want, limit = finished64(y64(operands), operands), bound(operands)
    for config in candidates(weights, activations).values():
        assert_within(run_guarded(GROUPED_MM.run, operands, config), want, limit)
