"""scaled_mm: 8-bit codes times 8-bit codes, a tile a program."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from fxquant.target import ARCHS, KernelConfig
from fxquant.triton_kernels.scaled_mm import SCALED_MM
from fxquant.triton_kernels.scaled_products import AS_FLOAT16, AS_THEY_ARE, BY_SHIFTS, MOST_IN_INT32
from tests.triton.helpers import ACTIVATIONS, ODD_SHAPES, assert_exact, edges_of_buckets, operands_of, problem, strided
from tests.triton.scaled import (
    FLOAT8,
    INT8,
    KINDS,
    all_candidates,
    check_exact,
    check_rounding,
    exact_operands,
    ids,
    small,
)

TILE = SCALED_MM.config(16, 32, 64, 2, AS_THEY_ARE, 4, 2)


def _config(weights: str, decode: int = AS_THEY_ARE) -> KernelConfig:
    return SCALED_MM.config(16, 32, 64, 2, decode if weights.startswith("float8") else AS_THEY_ARE, 4, 2)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=ids(KINDS))
def test_exact_on_odd_shapes(kind: tuple[str, str], shape: tuple[int, int, int]) -> None:
    check_exact(SCALED_MM, TILE, exact_operands(problem(shape, *kind, dtype="float32")))


@pytest.mark.parametrize("decode", [AS_THEY_ARE, AS_FLOAT16, BY_SHIFTS])
@pytest.mark.parametrize("kind", KINDS[1:], ids=ids(KINDS[1:]))
def test_rounding_stays_within_the_bound(kind: tuple[str, str], decode: int) -> None:
    for dtype in ("float16", "float32"):
        operands = operands_of(problem((17, 31, 129), *kind, dtype=dtype), residual=True, activation="relu")
        check_rounding(SCALED_MM, _config(kind[0], decode), operands)


@pytest.mark.parametrize("m", edges_of_buckets(65))
def test_rows_around_the_ends_of_buckets(m: int) -> None:
    check_exact(SCALED_MM, TILE, exact_operands(problem((m, 40, 64), *INT8)))


@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True), (True, True)])
def test_bias_activation_and_residual(bias: bool, residual: bool, activation: str) -> None:
    made = exact_operands(problem((17, 31, 63), *INT8), bias=bias, residual=residual, activation=activation)
    check_exact(SCALED_MM, TILE, made)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, which interprets
def test_every_activation_of_the_epilogue_is_passed_on() -> None:
    p = problem((2, 8, 64), *INT8, dtype="float32")
    results = [SCALED_MM.run(operands_of(p, activation=name), TILE) for name in ACTIVATIONS]
    for first, second in itertools.pairwise(results):
        assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=ids([INT8, FLOAT8]))
def test_rows_of_x_may_stand_apart(kind: tuple[str, str]) -> None:
    made = exact_operands(problem((17, 31, 63), *kind), residual=True)
    apart = strided(made)
    assert made.residual is not None
    assert made.x_scale is not None
    wide = torch.full((17, 40), 7.0, dtype=torch.float16)
    wide[:, :31] = made.residual
    apart = dataclasses.replace(apart, residual=wide[:, :31], x_scale=made.x_scale.repeat(1, 3)[:, :1])
    assert_exact(SCALED_MM.run(apart, TILE), SCALED_MM.run(made, TILE))
    by_column = dataclasses.replace(made, x=made.x.t().contiguous().t())
    assert_exact(SCALED_MM.run(by_column, TILE), SCALED_MM.run(made, TILE))


def test_what_is_behind_a_row_of_x_is_not_multiplied() -> None:
    nan = 0x7F  # of e5m2; times the 0 that fills the weight up it would be NaN
    made = exact_operands(problem((17, 31, 63), "float8_e4m3fn/channel", "float8_e5m2/token"))
    check_exact(SCALED_MM, TILE, strided(made, fill=nan))


def test_bfloat16_scales_of_the_weight() -> None:
    check_exact(SCALED_MM, TILE, exact_operands(problem((5, 33, 65), "int8/channel/bf16", "int8/token")))


# Codes that the interpreter misreads where it widens float8 itself: NaN of e4m3fn, and what is below the normal numbers
# of a format that numpy has not. BY_SHIFTS widens e4m3fn by integers, and e5m2 as the others do.
_MISREAD = {
    ("float8_e4m3fn/token", AS_THEY_ARE): [127],
    ("float8_e4m3fn/token", AS_FLOAT16): [*range(1, 8)],
    ("float8_e4m3fn/token", BY_SHIFTS): [],
    ("float8_e5m2/token", AS_THEY_ARE): [1, 2, 3],
    ("float8_e5m2/token", AS_FLOAT16): [1, 2, 3],
    ("float8_e5m2/token", BY_SHIFTS): [1, 2, 3],
}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize(("activations", "decode"), list(_MISREAD))
def test_every_code_of_float8_is_read_as_what_it_is(activations: str, decode: int) -> None:
    made = exact_operands(problem((256, 33, 64), "float8_e4m3fn/channel", activations, "float32"), bias=False)
    codes = torch.tensor([code for code in range(256) if code % 128 not in _MISREAD[activations, decode]])
    x = torch.zeros(len(codes), 64, dtype=torch.uint8)
    x[:, 3] = codes
    check_exact(
        SCALED_MM,
        _config("float8", decode),
        dataclasses.replace(made, x=x.view(made.x.dtype), x_scale=torch.ones(len(codes), 1)),
    )


def test_a_row_with_a_scale_that_is_nan_is_nan_and_no_other_is() -> None:
    made = operands_of(problem((17, 31, 63), *INT8))
    assert made.x_scale is not None
    scale = made.x_scale.clone()
    scale[4] = math.nan
    y = SCALED_MM.run(dataclasses.replace(made, x_scale=scale), TILE)
    assert y[4].isnan().all()
    assert y.isnan().sum() == y.shape[1]


@pytest.mark.parametrize(
    ("weights", "activations", "reason"),
    [
        ("int8/channel", "", "codes by codes"),
        ("int8/channel", "float8_e4m3fn/token", "on both sides"),
        ("int8/channel/affine", "int8/token", "without zero points"),
        ("int4/channel", "int8/token", "int8 or float8 codes"),
        ("int8/group32", "int8/token", "one scale a row of the weight"),
        ("float8_e4m3fn/group32/e8m0", "float8_e4m3fn/token", "one scale a row of the weight"),
        ("float8_e4m3fn/channel", "float8_e4m3fn/group32/e8m0", "one float32 scale a row of x"),
    ],
)
def test_declines_with_a_reason(weights: str, activations: str, reason: str) -> None:
    assert reason in SCALED_MM.why_not(problem((64, 64, 64), weights, activations), ARCHS["sm90"])


def test_declines_sums_that_overflow() -> None:
    assert not SCALED_MM.why_not(problem((64, 64, MOST_IN_INT32), *INT8), ARCHS["sm90"])
    assert "int32" in SCALED_MM.why_not(problem((64, 64, MOST_IN_INT32 + 1), *INT8), ARCHS["sm90"])
    assert not SCALED_MM.why_not(problem((64, 64, MOST_IN_INT32 + 1), *FLOAT8), ARCHS["sm90"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=ids([INT8, FLOAT8]))
def test_every_candidate(kind: tuple[str, str]) -> None:
    for config in all_candidates(SCALED_MM, *kind):
        check_exact(SCALED_MM, config, exact_operands(small(config, *kind), residual=True, activation="relu"))
