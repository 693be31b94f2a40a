"""Known answers: searches by hand, an outlier whose cost is a formula, and the figures that peers reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant import numerics
from fxquant.algorithms import quantize
from fxquant.algorithms.candidates import EXPONENTS, factors_of
from fxquant.algorithms.grids import grid_of, round_float
from fxquant.algorithms.ranges import Range, codes_of, plain_range
from fxquant.numerics import code_values, decode
from fxquant.spec import FORMATS, NumberFormat, TensorSpec, number_format
from tests.algorithms.cases import decoded, errors, parsed, tensors

FLOATS = [f for f in FORMATS.values() if f.kind == "float"]
FLOATS += [number_format(name) for name in ("fp3_e1m1", "fp6_e1m4", "fp7_e3m3", "fp8_e6m1", "fp8_e5m2")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x: Tensor, text: str, algorithm: str) -> float:
    spec = parsed(text)
    return float((x - decoded(quantize(x, spec, algorithm), spec)).norm() / x.norm())


def squared_errors(x: Tensor, spec: TensorSpec, factor: float) -> Tensor:
    """Of each row, one granule, under a range of that factor: by encode and decode, in float64."""
    if spec.scheme == "symmetric":
        found = numerics.encode(x, numerics.symmetric_scales(x.abs().amax(1, keepdim=True) * factor, spec), spec)
    elif spec.scheme == "affine":
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        found = numerics.encode(x, numerics.affine_scales(low * factor, high * factor, spec), spec)
    else:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        cut = (high - low) * ((1 - torch.tensor(factor)) / 2)
        found = numerics.encode(x, numerics.shift_scales(low + cut, high - cut, spec), spec)
    return errors(x, found, spec, 2)


@pytest.mark.parametrize(
    "text",
    ["int2/group5", "int3/group8", "int4/group6/affine", "int2/group8/shift/bf16", "fp4_e2m1/group6", "mxfp4", "mxfp8"],
)
def test_mse_is_the_best_of_all_ranges_on_small_granules(text: str) -> None:
    spec = parsed(text)
    size = spec.granularity.size
    x = normal(200, size) * torch.logspace(-3, 3, 200)[:, None]
    factors = [2.0**e for e in EXPONENTS] if spec.scale == "e8m0" else factors_of(size, spec)
    best = torch.stack([squared_errors(x, spec, factor) for factor in factors]).amin(0)
    found = errors(x, quantize(x, spec, "mse"), spec, 2)
    # The plain range wins ties up to 2**-12, and steps are compared in float32: within twice that.
    assert bool((found <= best * (1 + 2.0**-11)).all())
    assert bool((found >= best * (1 - 2.0**-11)).all())


@pytest.mark.parametrize("text", ["int4/group128", "int4/group128/affine", "int3/group64/shift", "int8/group4096"])
def test_a_finer_search_over_a_wider_range_gains_nothing_to_speak_of(text: str) -> None:
    spec = parsed(text)
    x = normal(24, spec.granularity.size)
    found = errors(x, quantize(x, spec, "mse"), spec, 2).sum()
    finest = torch.stack([squared_errors(x, spec, index / 400) for index in range(40, 401, 2)]).amin(0).sum()
    # 24 factors against 180: the least of more draws is less, by a few percent where granules are small.
    assert float(found / finest) <= 1.05


def test_mse_of_nvfp4_is_the_best_of_all_block_scales() -> None:
    spec, x = parsed("nvfp4"), normal(64, 16)
    plain = quantize(x, spec)
    tried = []
    for pattern in range(1, 0x7F):
        scale = torch.full((64, 1), pattern, dtype=torch.uint8).view(torch.float8_e4m3fn)
        steps = (x / (scale.float() * plain.tensor_scale)).clamp(-6, 6)
        values = round_float(steps, spec.format) * (scale.float() * plain.tensor_scale)
        tried.append((values.double() - x.double()).square().sum(1))
    found = errors(x, quantize(x, spec, "mse"), spec, 2)
    best = torch.stack(tried).amin(0)
    assert bool((found >= best * (1 - 2.0**-11)).all())
    # An octave up and one and a half down are tried; hardly a granule wants more.
    assert float(found.sum() / best.sum()) <= 1.01


def test_clipping_one_outlier_gains_what_the_formula_says() -> None:
    """N values, uniform on [-1, 1], and one at A = 4, in int6 (31 steps up).

    Squared error under a range c * A: N * (c * A / 31)**2 / 12 of rounding and ((1 - c) * A)**2 of clipping. With
    r = N / (12 * 31**2) = 1 it is least at c = 1 / (1 + r) = 1/2, and then a (1 + r)-th of that at c = 1.
    """
    spec, count = parsed("int6/tensor"), 12 * 31**2
    x = torch.cat([torch.linspace(-1, 1, count), torch.tensor([4.0])])
    plain, found = quantize(x, spec), quantize(x, spec, "mse")
    gain = float(errors(x, plain, spec, 2) / errors(x, found, spec, 2))
    # [-1, 1] ends within a step of 4/31 or 2/31: up to 6.5 % and 3.2 % of values are off by up to 3 * step**2 / 12.
    assert 2 * 0.87 * 0.93 <= gain <= 2 * 1.13 * 1.07
    # Near the minimum the error grows by (1 + r)**2 / r * (c - 1/2)**2; factors are 5 % apart.
    assert float(found.scale / plain.scale) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("text", ["int4/group128/shift", "int2/group128/shift"])
def test_hqq_finds_the_grid_that_the_values_lie_on(text: str) -> None:
    """All values on a grid but one far out: the plain range loses the grid, hqq finds it again."""
    spec = parsed(text)
    codes = torch.randint(0, int(spec.qmax) + 1, (50, 128), generator=torch.Generator().manual_seed(0)).float()
    x = codes * 0.125 + 3
    x[:, 7] += 0.02
    plain, found = (errors(x, quantize(x, spec, a), spec, 1) for a in ("minmax", "hqq"))
    assert bool((found <= plain).all())
    # What is left is little more than the one value's own distance from the grid.
    assert float(found.max()) <= 0.1 * float(plain.max())
    assert float(found.median()) <= 0.0201


def test_weight_errors_of_quanto_are_met_in_the_same_scheme() -> None:
    """Relative Frobenius errors on N(0, 1) 1024 x 1024 that Quanto's HqqOptimizer and MaxOptimizer reach."""
    x = normal(1024, 1024)
    for bits, rounding, hqq in ((4, 0.0998, 0.0966), (2, 0.501, 0.491)):
        text = f"int{bits}/group128/shift"
        assert round(relative_error(x, text, "minmax"), 4 if bits == 4 else 3) <= rounding
        assert relative_error(x, text, "hqq") <= hqq
        assert relative_error(x, text, "mse") < relative_error(x, text, "minmax")


@pytest.mark.parametrize("algorithm", ["mse", "hqq"])
@pytest.mark.parametrize("text", ["int4/group128/affine/bf16", "int4/group32", "int8/channel", "nvfp4"])
def test_the_result_does_not_depend_on_the_unit_of_the_weights(text: str, algorithm: str) -> None:
    spec, x = parsed(text), normal(32, 256)
    one, other = quantize(x, spec, algorithm), quantize(x * 2.0**-20, spec, algorithm)
    assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))


@pytest.mark.parametrize("number", FLOATS, ids=str)
def test_round_float_is_encode_and_decode(number: NumberFormat) -> None:
    """At every code, every midpoint, and the floats beside them, under scale 1."""
    values = code_values(number).double()
    values = values[values.isfinite()].unique()
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middle]).float()
    x = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)]).clamp(number.qmin, number.qmax)
    spec = TensorSpec.parse(f"{number}/tensor")
    found = numerics.encode(x, numerics.symmetric_scales(torch.tensor([number.qmax]), spec), spec)
    assert found.scale.tolist() == [1.0]
    wanted = decode(found.codes, found.scale, None, spec, torch.float32)
    assert torch.equal(round_float(x.clone(), number), wanted)


@pytest.mark.parametrize(
    "text", ["int8/token", "int4/token/affine/bf16", "int3/token/shift", "fp6_e3m2/token", "float8_e5m2/token", "mxfp6"]
)
def test_a_grid_has_the_values_that_encode_and_decode_give(text: str) -> None:
    spec = parsed(text)
    x = tensors()["heavy tails"][:, :32].contiguous()
    plain = plain_range(x, spec)
    for ranges in (plain, Range(plain.low * 0.7, plain.high * 0.7)):
        grid = grid_of(ranges, spec, None)
        wanted = decoded(codes_of(x, ranges, spec), spec)
        assert torch.equal(grid.values(grid.steps(x)), wanted)
        # Counted in steps: one rounding of x * factor, one of the step's size.
        steps = (wanted - x) / grid.scale
        bound = 2.0**-22 * (x.abs() / grid.scale + spec.qmax)
        assert bool(((grid.residual_steps(x) - steps).abs() <= bound).all())
