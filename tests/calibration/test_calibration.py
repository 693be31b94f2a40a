"""What a calibration sets: ranges, and in which modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxquant.calibration import Calibration
from fxquant.errors import UncalibratedModules
from fxquant.nn import QLinear
from tests.calibration.helpers import (
    Through,
    calibrate,
    input_scale,
    is_uncalibrated,
    output_scale,
    quantized,
    run,
    scale,
)


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 4.0), (0.5, 3.0), (0.9, 2.2)])
def test_the_momentum_counts_for_inputs_and_for_outputs(momentum: float, expected: float) -> None:
    """Quanto gives 2.2 for each (QUANTO.md 1.6)."""
    model = Through()
    with Calibration(momentum=momentum):
        run(model, 2.0, 4.0)
    torch.testing.assert_close(input_scale(model), scale(expected), rtol=2.0**-23, atol=0)
    assert torch.equal(input_scale(model), output_scale(model))


def test_the_default_momentum_is_nine_tenths() -> None:
    model = Through()
    with Calibration():
        run(model, 2.0, 4.0)
    torch.testing.assert_close(input_scale(model), scale(2.2), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize(("values", "expected"), [((1.0, 3.0), 2.0), ((3.0, 1.0, 1.0), 1.5), ((0.0, 2.0), 1.0)])
def test_one_and_zero_are_values_like_others(values: tuple[float, ...], expected: float) -> None:
    """Quanto takes a recorded 1.0 for nothing recorded."""
    model = Through()
    with Calibration(momentum=0.5):
        run(model, *values)
    assert torch.equal(input_scale(model), scale(expected))


@pytest.mark.parametrize(("observer", "expected"), [("minmax", 8.0), ("percentile", 8.0), ("absmax", 4.0)])
def test_observers(observer: str, expected: float) -> None:
    model = Through()
    with Calibration(observer=observer, momentum=0.0, percentile=100):
        run(model, 8.0, 4.0)
    assert torch.equal(input_scale(model), scale(expected))


def test_percentile_and_mse_leave_outliers_out() -> None:
    values = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([1000.0])])
    for observer, below in (("percentile", 1.01), ("mse", 1000.0)):
        model = Through()
        with Calibration(observer=observer) as c:
            model(values)
        side = c.stats["(root)"].input
        assert side is not None
        assert side.absmax == 1000.0
        assert side.range < below or observer == "mse"
        assert torch.equal(input_scale(model), torch.tensor(side.scale))


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("w=float8_e4m3fn/channel x=float8_e4m3fn/token", 448.0),
        ("w=float8_e5m2/channel x=float8_e5m2/token", 57344.0),
        ("w=int8/channel x=int8/tensor", 127.0),
    ],
)
def test_the_scale_is_the_range_over_the_largest_code(spec: str, steps: float) -> None:
    model = Through(spec)
    with Calibration():
        run(model, 3.0)
    assert torch.equal(input_scale(model), scale(3.0, steps))
    assert input_scale(model).shape == ()


def test_a_batch_of_zeros_gives_a_usable_scale() -> None:
    """Quanto's is 0, and everything after it NaN."""
    model = Through()
    with Calibration():
        model(torch.zeros(2, 3))
    assert torch.equal(input_scale(model), scale(1.0))


def test_linears_are_calibrated_and_then_static() -> None:
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    x = torch.randn(32, 8)
    dynamic = model(x)
    with Calibration() as c:
        inside = model(x)
    first, last = model[0], model[2]
    assert isinstance(first, QLinear)
    assert isinstance(last, QLinear)
    assert not torch.equal(inside, dynamic)  # activations are float while they are observed
    assert torch.equal(input_scale(first), x.abs().max() / 127)
    assert torch.equal(input_scale(last), output_scale(first)) or input_scale(last) < output_scale(first)
    rounded = torch.ops.fxquant.fake_quantize_static(x, input_scale(first), "int8/tensor")
    assert torch.equal(first(x), nn.functional.linear(rounded, first.float_weight(x.dtype), first.bias))
    assert list(c.stats) == ["0", "2"]
    assert {"0.input_scale", "2.output_scale"} <= set(model.state_dict())


def test_frozen_modules_are_calibrated_like_others() -> None:
    torch.manual_seed(0)
    model = quantized(nn.Linear(8, 4))
    frozen = copy.deepcopy(model)
    assert isinstance(frozen, QLinear)
    frozen.freeze()
    x = torch.randn(32, 8)
    for module in (model, frozen):
        with Calibration(observer="mse"):
            module(x)
    assert torch.equal(input_scale(model), input_scale(frozen))
    # The static kernel and the float product of the rounded values: a sum of 8 products, in another order.
    torch.testing.assert_close(frozen(x), model(x), rtol=0, atol=16 * 2.0**-24 * 8 * float(x.abs().max()))


def test_called_with_keywords_only() -> None:
    model = quantized(nn.Linear(4, 4))
    with Calibration() as c:
        model(input=torch.ones(2, 4))
    assert c.stats[model].calls == 1
    assert torch.equal(input_scale(model), scale(1.0))


def test_each_call_of_a_shared_module_counts() -> None:
    shared = Through()
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with Calibration(momentum=0.5) as c:
        run(model, 2.0)
        run(model, 4.0)
    assert list(c.stats) == ["0"]
    assert c.stats["0"].calls == 4
    assert torch.equal(input_scale(shared), scale(3.5))  # 2, 2, 4, 4


def test_only_what_can_be_calibrated_is_set() -> None:
    fixed, floating, plain = Through(calibratable=False), Through("w=int8/channel"), Through()
    with Calibration() as c:
        run(nn.Sequential(fixed, floating, plain), 2.0)
    assert is_uncalibrated(fixed)
    assert is_uncalibrated(floating)
    assert list(c.stats) == ["0", "2"]
    assert [c.stats[path].written for path in c.stats] == [False, True]


def test_empty_batches_count_as_calls_only() -> None:
    model = Through()
    with Calibration() as c:
        model(torch.empty(0, 4))
        run(model, 2.0)
    stats = c.stats[model]
    assert stats.input is not None
    assert (stats.calls, stats.input.batches) == (2, 1)


def test_integers_are_not_observed() -> None:
    model = nn.Sequential(Through(), Through())
    with pytest.warns(UncalibratedModules, match="'0'"):
        calibrate(Calibration(model), lambda: (model[0](torch.ones(3, dtype=torch.int64)), run(model[1], 2.0)))


def test_under_inference_mode_the_scales_are_ordinary_tensors() -> None:
    model = quantized(nn.Linear(4, 4))
    with torch.inference_mode(), Calibration():
        model(torch.ones(2, 4))
    assert not input_scale(model).is_inference()
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    copy.deepcopy(model)


def test_half_precision_has_float32_scales() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = Through()
        with Calibration():
            model(torch.tensor([[3.0, -2.0]], dtype=dtype))
        assert torch.equal(input_scale(model), scale(3.0))
        assert input_scale(model.half()).dtype is torch.float32
