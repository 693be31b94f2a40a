"""The linears of known models: sizes against the models' parameters, and the file for `fxquant tune --shapes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shapes import BATCHES, LINEARS, Linear, main, problems_of
from fxquant.tuning.problems import read_problems


def of(model: str) -> dict[str, Linear]:
    return {linear.name: linear for linear in LINEARS if linear.model == model}


def parameters(model: str, names: list[str]) -> int:
    return sum(of(model)[name].n * of(model)[name].k for name in names)


def test_rows() -> None:
    assert of("Flux.1-dev")["double.image.qkv"].rows(4) == 4 * 4096
    assert of("Flux.1-dev")["single.qkv+mlp"].rows(1) == 4096 + 512
    assert of("CogVideoX-5b")["qkv"].rows(1) == 17776
    assert of("Llama-3-8B")["decode.qkv"].rows(4) == 4
    assert all(linear.rows(1) == 1 for linear in LINEARS if linear.phase in ("modulation", "decode"))


def test_flux_has_twelve_billion_parameters() -> None:
    sides = ("image", "text")
    double = parameters("Flux.1-dev", [f"double.{s}.{n}" for s in sides for n in ("qkv", "out", "ff.up", "ff.down")])
    double += len(sides) * parameters("Flux.1-dev", ["double.modulation"])
    single = parameters("Flux.1-dev", ["single.qkv+mlp", "single.out", "single.modulation"])
    assert 19 * double + 38 * single == pytest.approx(11.9e9, rel=0.01)


def test_llama_has_eight_billion_parameters() -> None:
    block = parameters("Llama-3-8B", [f"decode.{name}" for name in ("qkv", "o", "gate+up", "down")])
    assert 32 * block + 2 * parameters("Llama-3-8B", ["lm_head"]) == pytest.approx(8.03e9, rel=0.01)


@pytest.mark.parametrize(("model", "blocks", "names", "size"), [
    ("PixArt-Sigma", 28, ["self.qkv", "self.out", "cross.q", "cross.kv", "self.out", "ff.up", "ff.down"], 0.6e9),
    ("CogVideoX-5b", 42, ["qkv", "out", "ff.up", "ff.down", "modulation", "modulation"], 5.5e9),
    ("AuraFlow", 32, ["single.qkv", "single.out", "single.ff.gate+up", "single.ff.down", "modulation"], 5.5e9),
])  # fmt: skip
def test_blocks_make_up_the_model(model: str, blocks: int, names: list[str], size: float) -> None:
    assert blocks * parameters(model, names) == pytest.approx(size, rel=0.1)


def test_problems_are_distinct_and_of_the_preset() -> None:
    problems = problems_of(["int8dq", "int4wo"])
    assert len(set(problems)) == len(problems)
    assert {problem.activations for problem in problems} == {"int8/token", ""}
    assert {problem.dtype for problem in problems} == {"bfloat16"}
    assert len(problems_of(["int8dq"])) <= len(LINEARS) * len(BATCHES)


def test_the_file_is_one_that_tune_reads(tmp_path: Path) -> None:
    file = tmp_path / "shapes.json"
    assert main(["--json", str(file), "--preset", "int8wo"]) == 0
    assert read_problems(file) == problems_of(["int8wo"])
