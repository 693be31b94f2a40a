"""The script that fills our column beside published tables: the tables, their recipes, and a run on tiny pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_recipes import __main__ as script
from benchmarks.gpu_recipes.measuring import GIB, Effort, Measured, measure
from benchmarks.gpu_recipes.pipelines import Setting
from benchmarks.gpu_recipes.published import FLOAT_DTYPES, RENAMED, TABLES, WITHOUT, Cell, published
from fxquant.spec import linear_spec
from tests.integrations import small_pipelines


def test_tables_are_read_whole() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) - 1 for path in TABLES.glob("*.csv"))
    rows = published()
    assert len(rows) == lines == 173
    best = next(row for row in rows if row.cell == Cell(script.FLUX, 1, True, True, True, "fp8dqrow"))
    assert (best.gpu, best.seconds) == ("H100", 2.966)
    assert {row.model_memory for row in rows if row.cell.recipe == "sparsify" and row.gpu == "H100"} == {None}


def test_every_published_recipe_is_ours_or_has_a_reason() -> None:
    for recipe in {row.cell.recipe for row in published()}:
        cell = Cell("any", recipe=recipe)
        if recipe in FLOAT_DTYPES:
            assert cell.spec is None
        elif not cell.why_not:
            assert cell.spec == linear_spec(RENAMED.get(recipe, recipe))
    assert Cell("any", recipe="sparsify").why_not == WITHOUT["sparsify"]


def test_our_column_stands_beside_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = Measured(10.0, 20.0, 2.0, "transformer 494", torch.ones(3))

    def fake(cell: Cell, setting: Setting, effort: object) -> Measured:
        assert setting.device == "cuda"
        if cell.recipe == "fp8wo":
            raise torch.OutOfMemoryError("too small")
        return measured

    monkeypatch.setattr(script, "measure", fake)
    words = ["--model", script.FLUX, "--batch", "1", "--gpu", "H100", "--device", "cuda", "--results", str(tmp_path)]
    assert script.main(words) == 0
    figures = json.loads((tmp_path / "gpu_recipes.json").read_text())["figures"]
    wanted = [row for row in published() if row.cell.model == script.FLUX and row.cell.batch == 1]
    assert len(figures) == len({row.cell for row in wanted})
    row = next(f for f in figures if f["cell"]["recipe"] == "fp8dqrow" and f["cell"]["compile_vae"])
    assert row["torchao"]["seconds"] > 2
    assert row["fxquant"]["seconds"] == 2.0
    failed = next(f for f in figures if f["cell"]["recipe"] == "fp8wo")
    assert failed["why_not"].startswith("OutOfMemoryError")
    assert failed["fxquant"]["seconds"] is None
    assert "| FLUX.1-dev |" in (tmp_path / "gpu_recipes.md").read_text()


def test_a_recipe_without_a_table_can_be_asked_for() -> None:
    chosen = script.parser().parse_args(["--recipe", "nvfp4", "--batch", "2"])
    cells = script.chosen_cells(chosen, published(), script.FLUX, "H100")
    assert cells == (Cell(script.FLUX, 2, True, True, False, "nvfp4"),)


def test_a_model_without_cells_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--model", "somebody/else", "--results", str(tmp_path)]) == 2
    assert "name some by --recipe" in capsys.readouterr().err


def check_tiny(folder: Path, words: list[str]) -> dict[str, dict[str, float]]:
    """Run the tiny pipelines; the rows that are measured have a time and an error, quantized ones take less memory."""
    assert script.main(["--tiny", *words, "--results", str(folder)]) == 0
    data = json.loads((folder / "gpu_recipes.json").read_text())
    sizes: dict[str, dict[str, float]] = {}
    for row, figures in zip(data["rows"], data["figures"], strict=True):
        recipe, ours = figures["cell"]["recipe"], figures["fxquant"]
        if recipe in WITHOUT:
            assert figures["why_not"] == WITHOUT[recipe]
            continue
        assert figures["why_not"] == ""
        assert ours["seconds"] > 0
        assert float(row["rel. error"]) < 0.5
        sizes.setdefault(row["model"], {}).setdefault(recipe, ours["model GiB"])
    return sizes


def test_a_tiny_run(tmp_path: Path) -> None:
    words = ["--model", script.FLUX, "--recipe", "None", "--recipe", "int8dq", "--executor", "eager"]
    sizes = check_tiny(tmp_path, words)["FLUX.1-dev"]
    transformer = small_pipelines.made("flux").transformer
    assert sizes["None"] - sizes["int8dq"] > 0.7 * sum(t.nbytes for t in transformer.parameters()) / GIB


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
def test_every_recipe_on_tiny_pipelines(tmp_path: Path) -> None:
    sizes = check_tiny(tmp_path, [])
    assert set(sizes) == {"FLUX.1-dev", "CogVideoX-5b"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("model", [script.FLUX, script.COGVIDEOX])
def test_a_quantized_vae_is_compiled_too(model: str) -> None:
    """Its linears are quantized besides the transformer's; the picture stays the float one's but for that."""
    setting, effort = Setting("cpu", steps=1, tiny=True), Effort(warm_up=1, rounds=1, executor="eager")
    plain = measure(Cell(model), setting, effort)
    cell = Cell(model, fuse=True, compile=True, compile_vae=True, recipe="int8dq")
    both = measure(cell, setting, effort)
    assert "vae" in both.quantized
    assert 15 < both.error_to(plain).sqnr < 80
