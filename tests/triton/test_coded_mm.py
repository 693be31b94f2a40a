"""coded_mm, interpreted: exact where float32 is, within the bound of its sums elsewhere."""

from __future__ import annotations

import dataclasses

import pytest

from fxquant.numerics.tiles import chunk_width
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.triton_kernels.coded_mm import CODED_MM
from tests.triton.coded import EVERY_KIND, exact, within_bound
from tests.triton.helpers import ODD_SHAPES, assert_exact, beside, operands_of, problem, strided

SMALL = CODED_MM.config(16, 16, 1, 8, 0, 0, 0, 4, 2)
SPLIT = CODED_MM.config(16, 32, 3, 8, 0, 0, 0, 4, 2)
HALVES = CODED_MM.config(16, 32, 2, 8, 0, 0, 0, 4, 2)
DESCRIBED = CODED_MM.config(16, 16, 1, 8, 0, 1, 0, 4, 2)


def _two_chunks(weights: str, m: int, n: int, dtype: str = "float16") -> Problem:
    chunk = chunk_width(TensorSpec.parse(weights).format.bits)
    return problem((m, n, chunk + 40), weights, dtype=dtype)


@pytest.mark.parametrize("weights", EVERY_KIND)
def test_exact(weights: str) -> None:
    """K is no multiple of a chunk, N and M none of a tile."""
    exact(CODED_MM, _two_chunks(weights, 5, 20), SMALL)


@pytest.mark.parametrize("weights", ["int4/group128", "int3/group32/affine"])
@pytest.mark.parametrize("config", [SPLIT, HALVES, DESCRIBED], ids=str)
def test_exact_by_other_ways(weights: str, config: KernelConfig) -> None:
    """Split along K, also with a split that has nothing to do; and by tensor descriptors. K is three chunks or two."""
    exact(CODED_MM, problem((5, 20, 384), weights), config)


@pytest.mark.parametrize("weights", ["int8/channel", "int4/group64/affine", "int4/group32/shift", "nvfp4"])
def test_within_the_bound_of_float32(weights: str) -> None:
    within_bound(CODED_MM, _two_chunks(weights, 5, 20), SMALL, residual=True)


@pytest.mark.parametrize("weights", ["int4/group128", "fp6_e2m3/group20", "int5/channel/shift"])
def test_float32(weights: str) -> None:
    exact(CODED_MM, _two_chunks(weights, 3, 20, "float32"), SMALL)
    within_bound(CODED_MM, _two_chunks(weights, 3, 20, "float32"), SPLIT)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    exact(CODED_MM, problem(shape, "int4/group32"), CODED_MM.config(32, 64, 1, 8, 0, 0, 0, 4, 2))


def test_several_tiles_of_rows() -> None:
    """33 rows in tiles of 16, in groups of two."""
    exact(CODED_MM, problem((33, 20, 64), "int8/channel"), CODED_MM.config(16, 16, 1, 2, 0, 0, 0, 4, 2))


def test_rows_apart() -> None:
    """x may lie in rows with anything between them."""
    operands = operands_of(_two_chunks("int4/group64", 5, 20))
    want = CODED_MM.run(operands, SMALL)
    assert_exact(CODED_MM.run(strided(operands), SMALL), want)
    columns = operands.x.t().contiguous().t()
    assert_exact(CODED_MM.run(dataclasses.replace(operands, x=columns), SMALL), want)


def test_what_no_descriptor_describes_is_read_by_pointers() -> None:
    operands = operands_of(_two_chunks("int4/group64", 5, 20))
    moved = dataclasses.replace(operands, tiles=beside(operands.tiles))
    assert_exact(CODED_MM.run(moved, DESCRIBED), CODED_MM.run(operands, DESCRIBED))
    assert CODED_MM.run(operands_of(problem((5, 0, 64), "int4/group64")), DESCRIBED).shape == (5, 0)


def test_a_tensor_scale_for_each_row() -> None:
    """Of tensors that were joined."""
    operands = operands_of(_two_chunks("nvfp4", 5, 20))
    assert operands.tensor_scale is not None
    each = dataclasses.replace(operands, tensor_scale=operands.tensor_scale.expand(20, 1).contiguous())
    assert_exact(CODED_MM.run(each, SMALL), CODED_MM.run(operands, SMALL))


def test_what_it_does_not_take() -> None:
    arch = ARCHS["sm90"]
    assert "activations" in CODED_MM.why_not(problem((1, 16, 64), "int8/channel", "int8/token"), arch)
    assert "axis 0" in CODED_MM.why_not(problem((1, 16, 64), "int8/channel1"), arch)
    assert not CODED_MM.why_not(problem((1, 16, 64), "int8/channel"), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weights", EVERY_KIND)
def test_every_candidate(weights: str, arch: str) -> None:
    """Each configuration that tuning may choose, on a problem of its own tile and one more row and column."""
    shapes = {1, 16, 64, 256, 1024, 8192}
    large = [_two_chunks(weights, m, 4096) for m in shapes]
    configs = {config for p in large for config in CODED_MM.candidates(p, ARCHS[arch])}
    for config in sorted(configs, key=str):
        tiny = _two_chunks(weights, config["BLOCK_M"] + 1, config["BLOCK_N"] + 1)
        exact(CODED_MM, tiny, config)
