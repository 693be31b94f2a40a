"""Stepped scales: whole multiples of a step of each row, so that codes times them are int8 codes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fxquant.algorithms import quantize
from fxquant.errors import InvalidSpec, UnevenScales
from fxquant.numerics import MOST_STEPS, decode, granule_shape, pack_granules, spread, unpack_granules
from fxquant.numerics.panels import steps_of, stores_steps
from fxquant.numerics.scales import row_steps, smallest_range
from fxquant.spec import TensorSpec

SPECS = ("int4/group32/stepped", "int3/group16/stepped", "int2/group10/stepped")
TINY = 2.0**-126  # the smallest normal number


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


@pytest.mark.parametrize(
    ("text", "k", "stored"),
    [
        ("int4/group32/stepped", 168, False),
        ("int4/group32/stepped", 176, True),  # 50 * 16 bits are 704 + 96
        ("int4/group32/stepped", 353, False),  # 7 places to fill up
        ("int4/group32/stepped", 356, True),  # 4: 50 * 32 are 1424 + 192 less 16
        ("int4/group128/stepped", 204, False),
        ("int4/group128/stepped", 208, True),
    ],
)
def test_steps_stand_behind_the_packed_scales(text: str, k: int, stored: bool) -> None:
    spec = TensorSpec.parse(text)
    found = quantize(torch.randn(70, k, generator=torch.Generator().manual_seed(0)), spec)
    packed = pack_granules(found.scale, spec, 70, k)
    assert stores_steps(k, spec) is stored
    assert list(packed.shape) == granule_shape(70, k, spec) == [70 * found.scale.shape[1] + stored * 70]
    assert not stored or torch.equal(packed[-70:], steps_of(found.scale))
    assert torch.equal(unpack_granules(packed, spec, 70, k), found.scale)


@given(patterns=st.lists(st.integers(1 << 23, (255 << 23) - 1), min_size=1, max_size=40), text=st.sampled_from(SPECS))
@example(patterns=[(127 << 23) - 1, 127 << 23, (127 << 23) + 1, (255 << 23) - 1], text=SPECS[0])
def test_the_step_of_a_row_is_rounded_up_to_four_bits(patterns: list[int], text: str) -> None:
    spec = TensorSpec.parse(text)
    amax = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)[:, None].repeat(1, 2)
    exact = amax[:, :1] / spec.qmax * (spec.qmax / (spec.qmax + 0.5)) / MOST_STEPS
    mantissa, exponent = torch.frexp(exact)
    want = torch.ldexp((mantissa * 16).ceil() / 16, exponent)
    usable = amax[:, :1] >= smallest_range(spec.qmax) * 2 * MOST_STEPS
    assert torch.equal(row_steps(amax, spec), torch.where(usable, want, 0.0))


# ---- the step of given scales


def plain_step(row: torch.Tensor) -> float | None:
    """The largest number that all of a row are 0 to MOST_STEPS of, in exact fractions; None if there is none."""
    if row.isnan().any():
        return math.nan
    if row.isinf().any() or (row < 0).any():
        return None
    known = [Fraction(float(scale)) for scale in row if scale > 0]
    for parts in range(1, MOST_STEPS + 1) if known else ():
        step = max(known) / parts
        if all((scale / step).denominator == 1 for scale in known):
            return float(step) if step >= Fraction(TINY) else None
    return None if known else 0.0


def assert_is_the_plain_step(row: torch.Tensor) -> None:
    want = plain_step(row)
    if want is None:
        with pytest.raises(UnevenScales, match="row 1"):
            steps_of(torch.stack([torch.zeros_like(row), row]))
    else:
        found = steps_of(row[None])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, torch.tensor([want], dtype=torch.bfloat16), rtol=0, atol=0, equal_nan=True)
        assert math.isnan(want) or float(found) == want


@given(
    significant=st.integers(1, 255),
    exponent=st.integers(-140, 126),
    multiples=st.lists(st.integers(0, MOST_STEPS + 1), min_size=1, max_size=40),
)
@example(significant=1, exponent=-126, multiples=[1, 3])
@example(significant=1, exponent=-127, multiples=[1, 3])
@example(significant=1, exponent=-127, multiples=[2, 6])
@example(significant=255, exponent=-133, multiples=[0, 1])
def test_multiples_of_a_step_have_it(significant: int, exponent: int, multiples: list[int]) -> None:
    step = math.ldexp(significant, exponent)
    assert_is_the_plain_step(torch.tensor([step * m for m in multiples], dtype=torch.float64).to(torch.bfloat16))


@given(row=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=4))
@example(row=[0x8000, 0x3F80])  # -0 and 1
@example(row=[0x7F00, 0x0080])  # 2^127 and 2^-126: what the one is of the other, float32 rounds to 0
@example(row=[0x7F00, 0x0001])
@example(row=[0xFF80, 0x3F80])
@example(row=[0x7F80, 0x7F80])
def test_any_scales_have_the_plain_step_or_none(row: list[int]) -> None:
    assert_is_the_plain_step(torch.tensor(row, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16))


@given(seed=st.integers(0, 2**31), apart=st.floats(0, 4), text=st.sampled_from(SPECS), algorithm=st.sampled_from(
    ["absmax", "mse"]))  # fmt: skip
def test_scales_of_a_quantizer_have_the_plain_step(seed: int, apart: float, text: str, algorithm: str) -> None:
    found = quantize(weights(seed, apart, 1.0), TensorSpec.parse(text), algorithm)
    assert steps_of(found.scale).tolist() == [plain_step(row) for row in found.scale]


@pytest.mark.parametrize(
    "row",
    [[1.0, 17.0], [1.0, 1.0625], [3.0, 0.125], [-1.0, 2.0], [-1.0, -2.0], [-1.0, 0.0], [math.inf, 1.0], [TINY / 2] * 2],
)
def test_scales_that_are_no_multiples_are_refused(row: list[float]) -> None:
    with pytest.raises(UnevenScales, match="row 1"):
        steps_of(torch.tensor([[1.0, 16.0], row], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("row", "step"),
    [([4.0, 6.0], 2.0), ([5.0, 7.0, 0.0], 1.0), ([1.5, 0.5625], 0.1875), ([0.0, 0.0], 0.0), ([], 0.0), ([TINY], TINY)],
)
def test_the_step_is_the_largest(row: list[float], step: float) -> None:
    assert steps_of(torch.tensor([row], dtype=torch.bfloat16)).tolist() == [step]


def test_no_rows_have_no_steps() -> None:
    assert steps_of(torch.zeros(0, 3, dtype=torch.bfloat16)).tolist() == []


@pytest.mark.parametrize(
    "text", ["int8/group32/stepped", "int5/group32/stepped", "int4/channel/stepped", "int4/group32/affine/stepped",
             "fp4_e2m1/group32/stepped"],
)  # fmt: skip
def test_only_small_integers_in_symmetric_groups_have_steps(text: str) -> None:
    with pytest.raises(InvalidSpec, match="stepped scales are for symmetric groups of int2, int3 or int4"):
        TensorSpec.parse(text)


def test_the_text_reads_back() -> None:
    assert str(TensorSpec.parse("int4/group32/stepped")) == "int4/group32/stepped"
