"""The picture: a file of the right kind, whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant.calibration import Calibration, plot
from fxquant.calibration.stats import TensorStats
from fxquant.errors import InvalidOption, NothingRecorded, PackageMissing, PatternMatchesNothing
from tests.calibration.helpers import Through

ODD = "$\\no$"  # not mathematics, though matplotlib would read it so
MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def calibration() -> Calibration:
    model = nn.ModuleDict({ODD: Through(), "c_d": nn.Sequential(Through())})
    torch.manual_seed(0)
    with Calibration(model) as c:
        model[ODD](torch.randn(500))
        model["c_d"](torch.zeros(3))
    return c


@pytest.mark.parametrize("kind", MAGIC)
def test_the_file_is_of_the_kind_that_its_name_says(calibration: Calibration, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"seen.{kind}"
    calibration.plot(path)
    assert path.read_bytes().startswith(MAGIC[kind])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_one_panel_for_inputs_and_one_for_outputs(calibration: Calibration) -> None:
    figure = plot.picture(list(calibration.stats.values()))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [f"{ODD}: input", f"{ODD}: output", "c_d.0: input", "c_d.0: output"]
    side = calibration.stats[ODD].input
    assert side is not None
    ends = [line.get_xdata()[0] for line in figure.axes[0].lines]  # pyright: ignore[reportIndexIssue]
    assert ends == [-side.range, side.range]


@pytest.mark.parametrize("largest", [1.0, 1.9, 1.0001, 1e-30, 0.0])
def test_the_bars_hold_every_value(largest: float) -> None:
    model = Through()
    with Calibration() as c:
        model(torch.cat([torch.linspace(-largest, largest, 1001)]))
    side = c.stats[model].input
    assert isinstance(side, TensorStats)
    counts, edges = plot._bars(side)
    assert sum(counts) == 1001
    assert len(edges) == len(counts) + 1 <= plot.STEPS + 1
    assert edges == sorted(edges)
    assert edges[0] <= -largest <= largest <= edges[-1]


def test_include_chooses_and_a_glob_that_matches_nothing_is_an_error(calibration: Calibration, tmp_path: Path) -> None:
    assert [m.path for m in plot._selected(calibration.stats, "c_d")] == ["c_d.0"]
    assert [m.path for m in plot._selected(calibration.stats, ["c_d", "$*"])] == [ODD, "c_d.0"]
    with pytest.raises(PatternMatchesNothing, match="'lm_head'"):
        calibration.plot(tmp_path / "seen.png", include=["c_d", "lm_head"])


def test_many_modules_stand_beside_each_other_and_too_many_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[Through() for _ in range(7)])
    with Calibration() as c:
        model(torch.ones(3))
    modules = list(c.stats.values())
    assert len(plot.picture(modules).axes) == 16  # four rows of two modules, the last without the second
    monkeypatch.setattr(plot, "ROWS", 2)
    assert plot.picture(modules).get_suptitle() == "3 more modules are not shown: choose with include="


def test_a_write_that_fails_leaves_the_old_file(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seen.svg"
    path.write_text("old")

    def refuse(*args: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        calibration.plot(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_other_kinds_of_file_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"ends in \.png, \.svg, \.pdf"):
        calibration.plot(tmp_path / "seen")


def test_nothing_seen_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(NothingRecorded, match="has seen no value"):
        Calibration().plot(tmp_path / "seen.png")


def test_without_matplotlib_the_error_says_what_to_install(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PackageMissing, match=r"needs matplotlib, .* pip install matplotlib"):
        calibration.plot(tmp_path / "seen.png")
