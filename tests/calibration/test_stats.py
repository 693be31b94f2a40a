"""What a calibration tells: modules that were not reached, what was seen, arguments that make no sense."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant.model
from fxquant.calibration import Calibration
from fxquant.errors import InvalidOption, UncalibratedModules, UncalibratedWarning
from tests.calibration.helpers import (
    Through,
    calibrate,
    input_scale,
    is_uncalibrated,
    run,
    scale,
)


def test_modules_that_were_not_reached_are_named_once() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Through(), nn.ModuleList([Through(), Through("w=int8/channel")])
            self.fixed = Through(calibratable=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Either()
    with pytest.warns(UncalibratedModules) as caught, Calibration():
        run(model, 2.0)
    assert len(caught) == 1
    warning = caught[0].message
    assert isinstance(warning, UncalibratedModules)
    assert warning.paths == ("unused.0",)
    assert torch.equal(input_scale(model.used), scale(2.0))
    assert caught[0].filename == __file__


def test_the_model_that_was_named_is_the_one_that_counts() -> None:
    model, other = nn.Sequential(Through(), Through()), Through()
    c = Calibration(model)
    with pytest.warns(UncalibratedModules, match="'1'"):
        calibrate(c, lambda: (run(model[0], 2.0), run(other, 2.0)))
    assert list(c.stats) == ["0"]
    assert is_uncalibrated(other)
    assert not is_uncalibrated(model[0])


def test_a_calibration_of_nothing_says_so() -> None:
    with pytest.warns(UncalibratedModules, match="no module whose activations it could calibrate"), Calibration() as c:
        nn.Linear(2, 2)(torch.ones(1, 2))
    assert str(c).endswith("nothing was seen")


def test_several_models_go_by_their_classes() -> None:
    first, second, alone = nn.Sequential(Through()), nn.Sequential(Through()), Through()
    with Calibration() as c:
        for model in (first, second, alone):
            run(model, 2.0)
    assert list(c.stats) == ["Sequential.0", "Sequential#2.0", "Through"]
    assert c.stats[second[0]].path == "Sequential#2.0"


def test_a_call_of_forward_alone_is_recorded_too() -> None:
    model = nn.Sequential(Through(), Through())
    with Calibration() as c:
        model.forward(torch.ones(2))
    assert list(c.stats) == ["0", "1"]
    assert torch.equal(input_scale(model[1]), scale(1.0))


def test_a_part_that_is_called_alone_goes_by_its_path_in_the_whole_that_is_called_too() -> None:
    model = nn.Sequential(nn.Sequential(Through()), Through())
    with Calibration() as c:
        run(model[0], 2.0)
        run(model, 2.0)
    assert list(c.stats) == ["0.0", "1"]


def test_methods_other_than_forward_are_calls_of_the_model() -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Sequential(Through()), Through()

        def generate(self) -> None:
            run(self.inner, 2.0)

    with pytest.warns(UncalibratedModules, match="'other'"), Calibration() as c:
        Generator().generate()
    assert list(c.stats) == ["inner.0"]


def test_static_modules_warn_until_they_are_calibrated() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fxquant.model.quantize(model, weights="int8", activations="int8/tensor")
    x = torch.ones(2, 4)
    with pytest.warns(UncalibratedModules, match="'1'"):
        calibrate(Calibration(model), lambda: model[0](x))
    model[0](x)
    with pytest.warns(UncalibratedWarning, match="activations of '1' are"):
        model(x)


def test_stats_within_the_block_are_those_so_far() -> None:
    model = Through()
    with Calibration() as c:
        assert len(c.stats) == 0
        run(model, 2.5)
        assert c.stats[model].calls == 1
        early = c.stats["(root)"].input
        run(model, 3.0)
        assert c.stats[model].calls == 2
    late = c.stats["(root)"].input
    assert early is not None
    assert late is not None
    assert (early.max, late.min, late.max) == (2.5, -0.75, 3.0)
    assert (int(early.counts.sum()), int(late.counts.sum())) == (4, 8)
    assert len(late.edges) == len(late.counts) + 1


def test_a_calibration_that_is_kept_does_not_keep_the_model() -> None:
    model = nn.Sequential(Through())
    with Calibration() as c:
        run(model, 2.0)
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None
    assert c.stats["0"].calls == 1


def test_str_is_a_table() -> None:
    model = nn.Sequential(Through(), Through("w=float8_e4m3fn/channel x=float8_e4m3fn/token"))
    with Calibration(momentum=0.5) as c:
        run(model, 2.0, 4.0)
    assert str(c).splitlines() == [
        "Calibration(observer='absmax', momentum=0.5)",
        "module  format         calls  input    range  scale     output   range  scale",
        "0       int8           2      -1 to 4  3      0.02362   -1 to 4  3      0.02362",
        "1       float8_e4m3fn  2      -1 to 4  3      0.006696  -1 to 4  3      0.006696",
    ]


def test_long_tables_are_cut() -> None:
    model = nn.Sequential(*[Through() for _ in range(43)])
    with Calibration() as c:
        run(model, 2.0)
    lines = str(c).splitlines()
    assert len(lines) == 1 + 1 + 40 + 1
    assert lines[-1] == "and 3 more"


def test_debug_logs_a_line_for_each_module(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fxquant"), Calibration(debug=True):
        run(nn.Sequential(Through(), Through()), 2.0)
    assert [record.message for record in caplog.records] == [
        f"calibrated {path} (int8): input -0.5 to 2, range 2, scale 0.01575, output -0.5 to 2, range 2, scale 0.01575"
        for path in ("0", "1")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"momentum": 1.0}, "option 'momentum' has the value 1.0: it takes a number from 0 to below 1."),
        ({"momentum": "0.9"}, "option 'momentum' has the value '0.9': it takes a number from 0 to below 1."),
        ({"momentum": math.nan}, "option 'momentum' has the value nan: it takes a number from 0 to below 1."),
        ({"observer": "max"}, "option 'observer' has the value 'max': it takes absmax, minmax, percentile, mse."),
        ({"percentile": 0}, "option 'percentile' has the value 0: it takes a number above 0, up to 100."),
        (
            {"model": 0.9},
            "option 'model' has the value 0.9: it takes an nn.Module; momentum and the rest are given by name.",
        ),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        Calibration(**arguments)
    assert str(caught.value) == words
