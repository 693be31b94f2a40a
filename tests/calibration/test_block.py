"""The block: again, within another one, left by an exception, around compiled models, in threads."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame

from fxquant.calibration import Calibration
from fxquant.errors import CalibrationOpen, NonFiniteActivation
from tests.calibration.helpers import (
    Through,
    input_scale,
    is_uncalibrated,
    quantized,
    run,
    scale,
)


def test_repeated_calibrations_start_afresh() -> None:
    model = Through()
    for value in (8.0, 2.0):
        with Calibration():
            run(model, value)
        assert torch.equal(input_scale(model), scale(value))
    again = Calibration(momentum=0.5)
    for value in (8.0, 2.0):
        with again:
            assert len(again.stats) == 0
            run(model, value)
        assert torch.equal(input_scale(model), scale(value))
        assert again.stats[model].calls == 1


def test_a_scale_that_was_handed_out_is_not_written_to() -> None:
    model = Through()
    with Calibration():
        run(model, 8.0)
    saved = model.state_dict()
    with Calibration():
        run(model, 2.0)
    assert torch.equal(saved["input_scale"], scale(8.0))


def test_nested_calibrations_each_see_everything_and_set_at_their_end() -> None:
    model = Through()
    with Calibration(momentum=0.0) as outer:
        run(model, 8.0)
        with Calibration(observer="minmax") as inner:
            run(model, 2.0)
        assert torch.equal(input_scale(model), scale(2.0))
        assert eval_frame._stance.stance == "force_eager"
    assert torch.equal(input_scale(model), scale(2.0))
    assert (outer.stats[model].calls, inner.stats[model].calls) == (2, 1)
    side = outer.stats[model].input
    assert side is not None
    assert side.absmax == 8.0


def test_blocks_may_overlap() -> None:
    model, first, second = Through(), Calibration(), Calibration()
    first.__enter__()
    second.__enter__()
    run(model, 2.0)
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    run(model, 4.0)
    second.__exit__(None, None, None)
    assert (first.stats[model].calls, second.stats[model].calls) == (1, 2)


def test_one_object_is_not_entered_twice_at_a_time() -> None:
    model, c = Through(), Calibration()
    with c:
        run(model, 2.0)
        with pytest.raises(CalibrationOpen, match="leave its block before"):
            c.__enter__()
    assert torch.equal(input_scale(model), scale(2.0))


def test_an_exception_sets_nothing_and_what_was_seen_can_be_read() -> None:
    model = Through()
    c = Calibration()
    with contextlib.suppress(KeyError), c:
        run(model, 2.0)
        raise KeyError("mine")
    assert is_uncalibrated(model)
    assert not c.stats[model].written
    assert c.stats[model].input is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error_that_names_the_module(bad: float) -> None:
    model = nn.Sequential(Through(), nn.Sequential(Through()))
    words = "1 of 4 values in the input of module '1.0' are NaN or infinity"
    caught = None
    try:
        with Calibration():
            run(model, 2.0)
            model[1](torch.tensor([[1.0, bad, 2.0, 3.0]]))
    except NonFiniteActivation as error:
        caught = error
    assert words in str(caught)
    assert is_uncalibrated(model[0])


def test_a_batch_that_is_not_finite_is_not_counted() -> None:
    model = Through()
    bad = torch.tensor([math.nan])
    with Calibration():
        run(model, 2.0)
        with pytest.raises(NonFiniteActivation, match=r"'\(root\)'"):
            model(bad)
    assert torch.equal(input_scale(model), scale(2.0))


def test_compiled_models_run_in_eager_within_and_are_compiled_again_after(fresh_dynamo: None) -> None:
    runs: list[str] = []

    def counting(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            runs.append("compiled")
            return gm(*args)

        return call

    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    x = torch.randn(4, 8)
    with torch.no_grad():
        compiled(x)
        assert runs == ["compiled"]
        with Calibration() as c:
            compiled(x)
        assert runs == ["compiled"]
        assert list(c.stats) == ["0", "2"]
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert runs == ["compiled"] * 2


def test_the_stance_that_the_user_chose_comes_back() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        with pytest.raises(ZeroDivisionError), Calibration():
            raise ZeroDivisionError
        assert eval_frame._stance.stance == "eager_on_recompile"


def test_threads_are_recorded_one_at_a_time() -> None:
    model = Through()
    with Calibration(observer="minmax") as c:
        threads = [threading.Thread(target=run, args=(model, *range(1, 51))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    side = c.stats[model].input
    assert side is not None
    assert (c.stats[model].calls, side.batches, int(side.counts.sum())) == (200, 200, 800)
