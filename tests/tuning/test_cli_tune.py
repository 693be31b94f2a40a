"""The command `fxquant tune`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxquant
from fxquant import cpu_kernels
from fxquant.cli import app
from fxquant.tuning import PlanCache, caches_of
from fxquant.tuning.plans.device import Device

pytestmark = pytest.mark.skipif(cpu_kernels.find_compiler() is None, reason="no C++ compiler: no kernels to tune")

SHAPE = {"m": 4, "n": 32, "k": 64, "weights": "int8/channel", "activations": "int8/token", "dtype": "float32"}


def small() -> tuple[nn.Module, Tensor]:
    """A model and its input, for the command line."""
    return nn.Linear(64, 32), torch.randn(3, 64)


def no_model() -> str:
    return "nothing"


def no_module() -> tuple[str, Tensor]:
    return "nothing", torch.randn(3, 64)


def broken() -> tuple[nn.Module, Tensor]:
    raise ZeroDivisionError("the user's own")


def interrupted() -> tuple[nn.Module, Tensor]:
    raise KeyboardInterrupt


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps([SHAPE]))
    return file


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["tune", *map(str, args)], terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_a_file_of_shapes_is_tuned_once(plans: Path, shapes: Path) -> None:
    first = run("--shapes", shapes)
    assert "linear 4×32×64 int8/token × int8/channel -> float32" in first
    assert "int8_linear_dynamic isa=" in first
    assert "1 problems for " in first
    assert "1 new, 0 known before; all measured" in first
    assert "0 new, 1 known before" in run("--shapes", shapes, "--mode", "quick")
    assert "1 new, 0 known before" in run("--shapes", shapes, "--mode", "full")


def test_a_model_is_tuned(plans: Path, fresh_dynamo: None) -> None:
    said = run(f"{__name__}:small", "--preset", "int8wo")
    assert "linear 4×32×64 float32 × int8/channel -> float32" in said
    assert "int8_linear_weight_only isa=" in said


def test_plans_are_exported_and_imported(plans: Path, shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "ours.json"
    assert f"1 plans for {caches_of('cpu')[0].device} written to {file}" in run("--shapes", shapes, "--export", file)
    for kept in plans.iterdir():
        kept.unlink()
    assert f"1 plans of {file} taken over into {caches_of('cpu')[0].path}" in run("--import", file)
    assert "0 new, 1 known before" in run("--shapes", shapes)


def test_plans_of_another_machine_are_refused(plans: Path, shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    run("--shapes", shapes, "--export", file)
    content = json.loads(file.read_text())
    theirs = dataclasses.replace(Device.from_json(content["device"]), name="Another CPU")
    file.write_text(json.dumps({**content, "device": theirs.to_json()}))
    said = run("--import", file, code=2)
    assert "OtherDevice" in said
    assert "name 'Another CPU' instead of" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a model, --shapes, --export or --import"),
        (["a:b", "--shapes", "x.json"], "leave one of them out"),
        (["no.such.module:make"], "it takes PACKAGE.MODULE:FUNCTION"),
        (["json"], "it takes PACKAGE.MODULE:FUNCTION"),
        ([f"{__name__}:no_model"], "returns (model, example inputs)"),
        ([f"{__name__}:no_module"], "returns (model, example inputs)"),
        ([f"{__name__}:SHAPE"], "returns (model, example inputs)"),
        (["--shapes", "x.json", "--preset", "int8dq"], "it is for a MODEL"),
        (["--shapes", "missing.json"], "holds no list of problems"),
        (["--shapes", "missing.json", "--target", "sm91"], "did you mean 'sm90'?"),
    ],
)
def test_what_cannot_be_done_is_named(plans: Path, args: list[str], words: str) -> None:
    assert words in run(*args, code=2)


def test_an_error_of_the_models_function_passes() -> None:
    result = CliRunner().invoke(app, ["tune", f"{__name__}:broken"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_ends_without_a_traceback() -> None:
    result = CliRunner().invoke(app, ["tune", f"{__name__}:interrupted"])
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_modules_beside_the_user_are_found_even_late(
    plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    (tmp_path / "users_model.py").write_text(
        "def make():\n    import users_parts\n    return users_parts.model(), users_parts.x()\n"
    )
    (tmp_path / "users_parts.py").write_text(
        "import torch\nmodel = lambda: torch.nn.Linear(64, 32)\nx = lambda: torch.randn(3, 64)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "1 problems for " in run("users_model:make", "--preset", "int8wo")


def test_a_model_on_the_cpu_is_tuned_for_what_its_graph_runs(plans: Path, fresh_dynamo: None) -> None:
    report = fxquant.tune(*small(), config="int8dq", target="cpu")
    found = fxquant.tune(*small(), config="int8dq")
    assert [one.entry.problem for one in report.outcomes] == [one.entry.problem for one in found.outcomes]
    assert found.known == len(found.outcomes)


def test_an_export_that_cannot_be_written_is_named(plans: Path, tmp_path: Path) -> None:
    assert "it cannot be written" in run("--export", tmp_path / "no" / "such" / "folder.json", code=2)


def test_an_unknown_mode_is_named(plans: Path, shapes: Path) -> None:
    assert "it takes 'quick' or 'full'" in run("--shapes", shapes, "--mode", "slow", code=2)


def test_the_cache_of_this_cpu_is_found_by_name() -> None:
    (cache,) = caches_of("cpu")
    assert isinstance(cache, PlanCache)
    assert cache.device.kind == "cpu"
