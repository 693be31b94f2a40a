"""scaled_mm_persistent: several tiles a program, loaded by descriptor."""

from __future__ import annotations

import dataclasses

import pytest

from fxquant.target import ARCHS, KernelConfig
from fxquant.triton_kernels.scaled_mm import SCALED_MM
from fxquant.triton_kernels.scaled_mm_persistent import SCALED_MM_PERSISTENT
from fxquant.triton_kernels.scaled_products import AS_THEY_ARE
from tests.triton.helpers import assert_exact, beside, operands_of, problem, strided
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

SHAPES = ((1, 1, 16), (1, 33, 80), (17, 31, 48), (33, 128, 272), (0, 33, 64))


def _config(programs: int = 3, halves: int = 0) -> KernelConfig:
    return SCALED_MM_PERSISTENT.config(16, 32, 64, 2, programs, halves, 0, 4, 2)


@pytest.mark.parametrize("halves", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS[:3], ids=ids(KINDS[:3]))
def test_exact_on_odd_shapes(kind: tuple[str, str], shape: tuple[int, int, int], halves: int) -> None:
    made = exact_operands(problem(shape, *kind, dtype="float32"), residual=True, activation="relu")
    check_exact(SCALED_MM_PERSISTENT, _config(halves=halves), made)


@pytest.mark.parametrize("programs", [1, 2, 7, 1000])
def test_any_number_of_programs(programs: int) -> None:
    check_exact(SCALED_MM_PERSISTENT, _config(programs), exact_operands(problem((33, 130, 80), *INT8)))


@pytest.mark.parametrize("kind", KINDS[2:], ids=ids(KINDS[2:]))
def test_rounding_stays_within_the_bound(kind: tuple[str, str]) -> None:
    check_rounding(SCALED_MM_PERSISTENT, _config(), operands_of(problem((17, 31, 208), *kind, dtype="float32")))


@pytest.mark.parametrize("step", [3, 16])
def test_rows_that_a_descriptor_cannot_read_are_moved(step: int) -> None:
    made = operands_of(problem((17, 31, 80), *INT8), residual=True)
    whole = SCALED_MM.run(made, SCALED_MM.config(16, 32, 64, 2, AS_THEY_ARE, 4, 2))
    assert_exact(SCALED_MM_PERSISTENT.run(strided(made, step), _config()), whole)


def test_a_row_of_x_may_stand_for_many_and_a_weight_begin_anywhere() -> None:
    made = operands_of(problem((17, 31, 80), *INT8), residual=True)
    same = made.x[:1].expand(17, 80)
    want = SCALED_MM_PERSISTENT.run(dataclasses.replace(made, x=same.contiguous()), _config())
    assert_exact(SCALED_MM_PERSISTENT.run(dataclasses.replace(made, x=same), _config()), want)
    tiles = beside(made.tiles)
    assert_exact(SCALED_MM_PERSISTENT.run(dataclasses.replace(made, x=same, tiles=tiles), _config()), want)


def test_declines_with_a_reason() -> None:
    many = problem((4096, 4096, 4096), *INT8)
    assert not SCALED_MM_PERSISTENT.why_not(many, ARCHS["sm90"])
    assert not SCALED_MM_PERSISTENT.why_not(many, ARCHS["sm100"])
    assert "descriptor" in SCALED_MM_PERSISTENT.why_not(many, ARCHS["sm80"])
    assert "descriptor" in SCALED_MM_PERSISTENT.why_not(many, ARCHS["gfx942"])
    assert "16 bytes" in SCALED_MM_PERSISTENT.why_not(problem((4096, 4096, 4100), *INT8), ARCHS["sm90"])
    assert "too few tiles" in SCALED_MM_PERSISTENT.why_not(problem((128, 4096, 4096), *INT8), ARCHS["sm90"])
    assert "too few tiles" in SCALED_MM_PERSISTENT.why_not(problem((4, 65536, 4096), *INT8), ARCHS["sm90"])


def test_specializes_warps_only_where_triton_can() -> None:
    for kind in (INT8, FLOAT8):
        p = problem((4096, 4096, 4096), *kind)
        assert not any(config["SPECIALIZE"] for config in SCALED_MM_PERSISTENT.candidates(p, ARCHS["sm90"]))
        assert any(config["SPECIALIZE"] for config in SCALED_MM_PERSISTENT.candidates(p, ARCHS["sm100"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=ids([INT8, FLOAT8]))
def test_every_candidate(kind: tuple[str, str]) -> None:
    for config in all_candidates(SCALED_MM_PERSISTENT, *kind):
        made = exact_operands(small(config, *kind, aligned=16), residual=True, activation="relu")
        check_exact(SCALED_MM_PERSISTENT, config, made)
