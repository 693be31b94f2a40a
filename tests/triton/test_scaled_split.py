"""scaled_mm_split: K cut into pieces, added up by a second kernel in a fixed order."""

from __future__ import annotations

import pytest

from fxquant.target import ARCHS, KernelConfig
from fxquant.triton_kernels.scaled_mm import SCALED_MM
from fxquant.triton_kernels.scaled_mm_split import MOST_ROWS, SCALED_MM_SPLIT
from fxquant.triton_kernels.scaled_products import AS_FLOAT16, AS_THEY_ARE, BY_SHIFTS
from fxquant.triton_kernels.scaled_tiles import PIECES
from tests.triton.helpers import ODD_SHAPES, assert_exact, operands_of, problem, strided
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


def _config(pieces: int, decode: int = AS_THEY_ARE) -> KernelConfig:
    return SCALED_MM_SPLIT.config(16, 32, 64, pieces, decode, 4, 2)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=ids([INT8, FLOAT8]))
def test_exact_on_odd_shapes(kind: tuple[str, str], shape: tuple[int, int, int]) -> None:
    check_exact(SCALED_MM_SPLIT, _config(3), exact_operands(problem(shape, *kind, dtype="float32"), residual=True))


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 16])
def test_any_number_of_pieces(pieces: int) -> None:
    made = exact_operands(problem((3, 40, 257), *INT8), residual=True, activation="relu")
    check_exact(SCALED_MM_SPLIT, _config(pieces), made)


@pytest.mark.parametrize("decode", [AS_THEY_ARE, AS_FLOAT16, BY_SHIFTS])
@pytest.mark.parametrize("kind", KINDS[2:], ids=ids(KINDS[2:]))
def test_rounding_stays_within_the_bound(kind: tuple[str, str], decode: int) -> None:
    operands = operands_of(problem((5, 31, 200), *kind, dtype="float32"), activation="relu")
    check_rounding(SCALED_MM_SPLIT, _config(3, decode), operands)


def test_int8_has_the_bits_of_scaled_mm() -> None:
    made = operands_of(problem((16, 65, 257), *INT8), residual=True, activation="silu")
    whole = SCALED_MM.run(made, SCALED_MM.config(16, 32, 64, 2, AS_THEY_ARE, 4, 2))
    assert_exact(SCALED_MM_SPLIT.run(strided(made), _config(4)), whole)


def test_declines_where_a_cut_does_not_pay() -> None:
    arch = ARCHS["sm90"]
    assert not SCALED_MM_SPLIT.why_not(problem((1, 1024, 4096), *INT8), arch)
    assert "K is too short" in SCALED_MM_SPLIT.why_not(problem((16, 131072, 4096), *INT8), arch)
    assert "K is too short" in SCALED_MM_SPLIT.why_not(problem((1, 64, 64), *INT8), arch)
    assert str(MOST_ROWS) in SCALED_MM_SPLIT.why_not(problem((MOST_ROWS + 1, 64, 8192), *INT8), arch)
    assert "codes by codes" in SCALED_MM_SPLIT.why_not(problem((1, 1024, 4096), "int8/channel"), arch)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=ids([INT8, FLOAT8]))
def test_every_candidate(kind: tuple[str, str], pieces: int) -> None:
    for config in all_candidates(SCALED_MM_SPLIT, *kind):
        if config["SPLIT_K"] == pieces:
            check_exact(SCALED_MM_SPLIT, config, exact_operands(small(config, *kind), residual=True, activation="relu"))


def test_no_candidate_cuts_into_another_number_of_pieces() -> None:
    assert {config["SPLIT_K"] for config in all_candidates(SCALED_MM_SPLIT, *INT8)} <= set(PIECES)
