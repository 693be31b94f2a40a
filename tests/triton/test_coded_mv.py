"""coded_mv, interpreted: exact where float32 is, within the bound of its sums elsewhere."""

from __future__ import annotations

import dataclasses

import pytest

from fxquant.numerics.tiles import chunk_width
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.triton_kernels.coded_mv import CODED_MV
from tests.triton.coded import EVERY_KIND, exact, within_bound
from tests.triton.helpers import assert_exact, operands_of, problem, strided

SMALL = CODED_MV.config(16, 1, 2, 0, 4)
HALVES = CODED_MV.config(16, 2, 2, 0, 4)
SPLIT = CODED_MV.config(16, 3, 2, 0, 4)
SHAPES = ((1, 1, 1), (1, 33, 65), (2, 31, 63), (4, 128, 257), (0, 33, 65))  # M, N, K


def _two_chunks(weights: str, m: int, n: int, dtype: str = "float16") -> Problem:
    chunk = chunk_width(TensorSpec.parse(weights).format.bits)
    return problem((m, n, chunk + 40), weights, dtype=dtype)


@pytest.mark.parametrize("weights", EVERY_KIND)
def test_exact(weights: str) -> None:
    """K is no multiple of a chunk, N none of a tile."""
    exact(CODED_MV, _two_chunks(weights, 2, 20), SMALL)


@pytest.mark.parametrize("weights", ["int4/group128", "int6/channel"])
@pytest.mark.parametrize("config", [SPLIT, HALVES], ids=str)
def test_exact_where_split(weights: str, config: KernelConfig) -> None:
    """Along K, also with a split that has nothing to do. K is three chunks or two."""
    exact(CODED_MV, problem((1, 20, 384), weights), config)


@pytest.mark.parametrize("weights", ["int8/channel", "int4/group64/affine", "int4/group32/shift", "nvfp4"])
def test_within_the_bound_of_float32(weights: str) -> None:
    within_bound(CODED_MV, _two_chunks(weights, 2, 20), SMALL, residual=True)


@pytest.mark.parametrize("weights", ["int4/group128", "fp6_e2m3/group20", "int5/channel/shift"])
def test_float32(weights: str) -> None:
    exact(CODED_MV, _two_chunks(weights, 3, 20, "float32"), SMALL)
    within_bound(CODED_MV, _two_chunks(weights, 3, 20, "float32"), SPLIT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    exact(CODED_MV, problem(shape, "int4/group32"), CODED_MV.config(64, 1, 2, 0, 4))


def test_rows_apart() -> None:
    """x may lie in rows with anything between them."""
    operands = operands_of(_two_chunks("int4/group64", 2, 20))
    want = CODED_MV.run(operands, SMALL)
    assert_exact(CODED_MV.run(strided(operands), SMALL), want)
    columns = operands.x.t().contiguous().t()
    assert_exact(CODED_MV.run(dataclasses.replace(operands, x=columns), SMALL), want)


def test_a_tensor_scale_for_each_row() -> None:
    """Of tensors that were joined."""
    operands = operands_of(_two_chunks("nvfp4", 2, 20))
    assert operands.tensor_scale is not None
    each = dataclasses.replace(operands, tensor_scale=operands.tensor_scale.expand(20, 1).contiguous())
    assert_exact(CODED_MV.run(each, SMALL), CODED_MV.run(operands, SMALL))


def test_what_it_does_not_take() -> None:
    arch = ARCHS["sm90"]
    assert "activations" in CODED_MV.why_not(problem((1, 16, 64), "int8/channel", "int8/token"), arch)
    assert "axis 0" in CODED_MV.why_not(problem((1, 16, 64), "int8/channel1"), arch)
    assert "rows" in CODED_MV.why_not(problem((5, 16, 64), "int8/channel"), arch)
    assert not CODED_MV.why_not(problem((1, 16, 64), "int8/channel"), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weights", EVERY_KIND)
def test_every_candidate(weights: str, arch: str) -> None:
    """Each configuration that tuning may choose, on a problem of its own tile and one more column."""
    large = [_two_chunks(weights, m, n) for m in (1, 2, 4) for n in (512, 4096, 65536)]
    configs = {config for p in large for config in CODED_MV.candidates(p, ARCHS[arch])}
    for config in sorted(configs, key=str):
        exact(CODED_MV, _two_chunks(weights, 3, config["BLOCK_N"] + 1), config)
