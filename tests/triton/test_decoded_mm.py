"""decoded_mm, interpreted: exact where no weight is rounded, within the bound of that elsewhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, KernelConfig
from fxquant.triton_kernels.decoded_mm import DECODED_MM
from fxquant.triton_kernels.decoded_tiles import SLAB_BYTES, slab_rows
from fxquant.triton_kernels.decoded_weight import decode_rows, empty_slab, is_scaled, slab_width
from tests.triton.coded import EVERY_KIND, exact, within_bound
from tests.triton.helpers import (
    ODD_SHAPES,
    assert_exact,
    operands_of,
    problem,
    run_guarded,
    strided,
    weight64,
)

FLOAT16_HOLDS = tuple(w for w in EVERY_KIND if w != "fp7_e5m1/channel")
# Three slabs of 32 rows of the weight for 70, the last one of 6; tiles of all of them by one program each, or by three.
BY_POINTER = DECODED_MM.config(16, 32, 64, 2, 32, 0, 0, 0, 4, 2)
BY_DESCRIPTOR = DECODED_MM.config(16, 32, 64, 2, 32, 3, 1, 0, 4, 2)
IN_HALVES = DECODED_MM.config(16, 256, 64, 2, 256, 0, 0, 0, 4, 2)


@pytest.mark.parametrize("config", [BY_POINTER, BY_DESCRIPTOR], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("weights", FLOAT16_HOLDS)
def test_exact(weights: str, config: KernelConfig) -> None:
    """Powers of two as scales: no weight is rounded. K is no multiple of a chunk, M and N none of a tile."""
    exact(DECODED_MM, problem((37, 70, 296), weights), config)


@pytest.mark.parametrize(
    "weights", ["int8/channel", "int4/group64/affine", "int4/group32/shift", "int4/group20/affine", "mxfp4", "nvfp4"]
)
def test_within_the_bound_of_rounding(weights: str) -> None:
    within_bound(DECODED_MM, problem((37, 70, 296), weights), BY_POINTER, residual=True)


def test_a_wide_tile_is_finished_in_halves() -> None:
    """More columns than one tile has, a bias, a residual and an activation."""
    within_bound(DECODED_MM, problem((17, 300, 130), "int8/channel"), IN_HALVES, residual=True)
    exact(DECODED_MM, problem((17, 300, 130), "int4/group32"), IN_HALVES)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    exact(DECODED_MM, problem(shape, "int4/group32"), BY_POINTER)
    exact(DECODED_MM, problem(shape, "int8/channel"), BY_DESCRIPTOR)


@pytest.mark.parametrize("weights", ["int4/group32/affine", "fp6_e2m3/group64", "int8/channel/affine"])
def test_the_slab_is_the_weight_rounded_once(weights: str) -> None:
    """Bit for bit: float32's product of code and scale in float16, or the code less its zero point."""
    operands = operands_of(problem((1, 70, 296), weights), seed=3)
    spec = TensorSpec.parse(weights)
    slab = empty_slab(6, operands)
    decode_rows(slab, 64, operands, 0)
    want = weight64(operands)[64:]
    if not is_scaled(spec, 296):
        want = want / operands.scale.double().T[64:]
    assert torch.equal(slab[:, :296], want.float().half())
    assert slab.shape[1] == slab_width(spec, 296)
    assert slab.isfinite().all()


def test_rows_apart() -> None:
    """x may lie in rows with anything between them, in columns, or where no descriptor can begin."""
    operands = operands_of(problem((37, 70, 296), "int4/group64"))
    for config in (BY_POINTER, BY_DESCRIPTOR):
        want = run_guarded(DECODED_MM.run, operands, config)
        assert_exact(DECODED_MM.run(strided(operands), config), want)
        columns = operands.x.t().contiguous().t()
        assert_exact(DECODED_MM.run(dataclasses.replace(operands, x=columns), config), want)
        moved = torch.empty(operands.x.numel() + 1, dtype=torch.float16)[1:].view(operands.x.shape).copy_(operands.x)
        assert_exact(DECODED_MM.run(dataclasses.replace(operands, x=moved), config), want)


def test_a_tensor_scale_for_each_row() -> None:
    operands = operands_of(problem((5, 70, 64), "nvfp4"))
    assert operands.tensor_scale is not None
    each = dataclasses.replace(operands, tensor_scale=operands.tensor_scale.expand(70, 1).contiguous())
    assert_exact(DECODED_MM.run(each, BY_POINTER), DECODED_MM.run(operands, BY_POINTER))


def test_what_it_does_not_take() -> None:
    arch = ARCHS["sm90"]
    assert "activations" in DECODED_MM.why_not(problem((4096, 16, 64), "int8/channel", "int8/token"), arch)
    assert "halves" in DECODED_MM.why_not(problem((4096, 16, 64), "int8/channel", dtype="float32"), arch)
    assert "float16" in DECODED_MM.why_not(problem((4096, 16, 64), "fp7_e5m1/channel"), arch)
    assert "256 rows" in DECODED_MM.why_not(problem((256, 16, 64), "int4/group32"), arch)
    assert "1024 rows" in DECODED_MM.why_not(problem((1024, 4096, 4096), "int4/group128"), arch)
    assert not DECODED_MM.why_not(problem((512, 16, 64), "int4/group32"), arch)


def test_slabs_are_bounded() -> None:
    assert slab_rows(problem((1, 300, 4096), "int4/group32")) == 512
    large = slab_rows(problem((1, 128256, 4096), "int4/group32"))
    assert large * 4096 * 2 == SLAB_BYTES
    assert slab_rows(problem((1, 4096, 1 << 20), "int4/group32")) == 256


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weights", FLOAT16_HOLDS)
def test_every_candidate(weights: str, arch: str) -> None:
    """Each tile that tuning may choose, on a problem of its own tile and one more row and column."""
    for config in DECODED_MM.candidates(problem((8192, 4096, 4096), weights), ARCHS[arch]):
        tiny = problem((config["BLOCK_M"] + 1, config["BLOCK_N"] + 1, 136), weights)
        exact(DECODED_MM, tiny, config)
