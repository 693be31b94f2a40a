"""Stepped scales: whole multiples of a step of each row, so that codes times them are int8 codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.algorithms import quantize
from fxquant.errors import InvalidSpec, UnevenScales
from fxquant.numerics import MOST_STEPS, decode, pack_granules, spread, unpack_granules
from fxquant.numerics.panels import steps_of
from fxquant.spec import TensorSpec

SPECS = ("int4/group32/stepped", "int3/group16/stepped", "int2/group10/stepped")


def weights(seed: int, spread_of_groups: float, size: float) -> torch.Tensor:
    """[12, 96]: groups of 8 whose sizes differ by factors up to 10 ** spread_of_groups."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.pow(10.0, spread_of_groups * torch.rand(12, 12, 1, generator=g))
    return (torch.randn(12, 12, 8, generator=g) * sizes).flatten(1) * size


@given(seed=st.integers(0, 2**31), apart=st.floats(0, 4), exponent=st.integers(-80, 80), text=st.sampled_from(SPECS))
def test_values_are_int8_codes_of_one_scale_and_at_most_half_a_step_off(
    seed: int, apart: float, exponent: int, text: str
) -> None:
    spec = TensorSpec.parse(text)
    w = weights(seed, apart, 2.0**exponent)
    found = quantize(w, spec)
    steps = steps_of(found.scale).double()[:, None]
    multiples = found.scale.double() / steps
    assert torch.equal(multiples, multiples.round())
    assert multiples.min() >= 1
    assert multiples.max() <= MOST_STEPS
    codes = found.codes.double() * spread(multiples, w.shape, spec.granularity)
    assert codes.abs().max() <= 127
    off = (decode(found.codes, found.scale, None, spec, torch.float32).double() - w.double()).abs()
    half = spread(found.scale.double() / 2, w.shape, spec.granularity)
    assert (off <= half * (1 + 2.0**-20)).all()


def test_no_more_is_lost_than_with_scales_in_bfloat16() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 1024, generator=g)

    def lost(text: str, algorithm: str) -> float:
        spec = TensorSpec.parse(text)
        found = quantize(w, spec, algorithm)
        return float((decode(found.codes, found.scale, None, spec, torch.float32) - w).norm() / w.norm())

    assert lost("int4/group32/stepped", "absmax") < lost("int4/group32/bf16", "absmax")
    assert lost("int4/group32/stepped", "mse") < lost("int4/group32/stepped", "absmax")
    assert lost("int4/group32/stepped", "mse") < 1.03 * lost("int4/group32/bf16", "mse")  # multiples are coarser


@pytest.mark.parametrize("algorithm", ["absmax", "mse", "hqq"])
def test_a_lone_granule_has_its_scale_in_bfloat16(algorithm: str) -> None:
    w = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    w[3] = 0.0
    w[5, 2] = math.nan
    found, plain = (quantize(w, TensorSpec.parse(f"int4/group32/{scale}"), algorithm) for scale in ("stepped", "bf16"))
    assert torch.equal(found.codes, plain.codes)
    torch.testing.assert_close(found.scale, plain.scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(steps_of(found.scale), plain.scale.flatten(), rtol=0, atol=0, equal_nan=True)


def test_granules_of_zeros_and_of_what_is_not_finite() -> None:
    spec = TensorSpec.parse("int4/group32/stepped")
    w = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    w[0] = 0.0
    w[1, :32] = 0.0
    w[2, 40] = math.inf
    w[3, 3] = 1e-42  # beside usual ones: its granule's scale is one step
    w[3, :32] = 0.0
    w[3, 5] = 1e-9
    found = quantize(w, spec)
    steps = steps_of(found.scale)
    assert not found.scale[0].any()
    assert not found.codes[0].any()
    assert found.scale[1, 0] == 0
    assert found.scale[2].isnan().tolist() == [False, True, False]
    assert found.scale[3, 0] > 0
    assert not found.codes[3, :32].any()
    assert steps[0] == 0
    assert steps[1] > 0
    assert steps[2].isnan()


def test_steps_stand_behind_the_packed_scales() -> None:
    spec = TensorSpec.parse("int4/group32/stepped")
    for k, stored in ((190, True), (170, False)):  # 50 * 2 bytes are 95 + 12, and not 85 + 12
        found = quantize(torch.randn(70, k, generator=torch.Generator().manual_seed(0)), spec)
        packed = pack_granules(found.scale, spec, 70, k)
        assert packed.shape == (70 * 6 + stored * 70,)
        assert not stored or torch.equal(packed[-70:], steps_of(found.scale))
        assert torch.equal(unpack_granules(packed, spec, 70, k), found.scale)


@pytest.mark.parametrize("row", [[1.0, 17.0], [1.0, 1.0625], [3.0, 0.125]])
def test_scales_that_are_no_multiples_are_refused(row: list[float]) -> None:
    with pytest.raises(UnevenScales, match="row 1"):
        steps_of(torch.tensor([[1.0, 16.0], row], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("row", "step"), [([4.0, 6.0], 2.0), ([5.0, 7.0, 0.0], 1.0), ([1.5, 0.5625], 0.1875), ([0.0, 0.0], 0.0)]
)
def test_the_step_is_the_largest(row: list[float], step: float) -> None:
    assert steps_of(torch.tensor([row], dtype=torch.bfloat16)).tolist() == [step]


@pytest.mark.parametrize(
    "text", ["int8/group32/stepped", "int5/group32/stepped", "int4/channel/stepped", "int4/group32/affine/stepped",
             "fp4_e2m1/group32/stepped"],
)  # fmt: skip
def test_only_small_integers_in_symmetric_groups_have_steps(text: str) -> None:
    with pytest.raises(InvalidSpec, match="stepped scales are for symmetric groups of int2, int3 or int4"):
        TensorSpec.parse(text)


def test_the_text_reads_back() -> None:
    assert str(TensorSpec.parse("int4/group32/stepped")) == "int4/group32/stepped"
