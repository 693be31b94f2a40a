"""`fxquant kernels`: what it shows and makes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime.errors import OutOfResources
from typer.testing import CliRunner, Result

from fxquant.cli import app
from fxquant.target import Arch, KernelConfig, Problem
from fxquant.triton_kernels import KERNELS
from fxquant.tuning.facts import Facts, facts_of

QUANTIZE = "64x0x512 op=quantize x=int8/token"


def fxquant(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "250", "TERM": "dumb"}).invoke(app, list(words))


def test_list_shows_every_kernel() -> None:
    result = fxquant("kernels", "list")
    assert result.exit_code == 0
    for kernel in KERNELS.values():
        assert kernel.name in result.output


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_inspect_shows_facts_and_time(target: str) -> None:
    result = fxquant("kernels", "inspect", "quantize_rows", "--target", target, "--problem", QUANTIZE)
    assert result.exit_code == 0, result.output
    for word in ("registers", "spills", "shared", "modelled, not measured", "µs", "hot loop", "load of 16 B"):
        assert word in result.output


def test_inspect_says_why_a_problem_is_not_taken() -> None:
    problem = "64x64x512 w=int8/channel x=int8/token"
    result = fxquant("kernels", "inspect", "quantize_rows", "--target", "sm90", "--problem", problem)
    assert result.exit_code == 0
    assert "not taken: another operation" in result.output


def test_compile_writes_code_and_a_manifest(tmp_path: Path) -> None:
    shapes, out = tmp_path / "shapes.json", tmp_path / "out"
    shapes.write_text(
        json.dumps([{"op": "quantize", "m": 64, "k": 512, "activations": "int8/token", "dtype": "float16"}])
    )
    result = fxquant("kernels", "compile", "--target", "sm90", "--shapes", str(shapes), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert f"TRITON_CACHE_DIR={out}" in result.output
    [entry] = json.loads((out / "manifest.json").read_text())["kernels"]
    assert (out / entry["file"]).read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["inspect", "quantise_rows", "--target", "sm90"],
            "unknown kernel 'quantise_rows'. Did you mean",
        ),
        (["inspect", "quantize_rows", "--target", "sm9"], "did you mean 'sm90'?"),
        (["inspect", "quantize_rows", "--target", "sm90", "--shapes", "nowhere.json"], "nowhere.json holds no list"),
        (["inspect", "quantize_rows", "--target", "sm90", "--problem", "64x512"], "it starts with MxNxK"),
        (["inspect", "quantize_rows", "--target", "sm90", "--problem", "1x1x1 y=2"], "'y=2' is none of w=, x="),
        (["inspect", "quantize_rows", "--target", "sm90", "--problem", QUANTIZE, "--shapes", "f"], "one of the two"),
        (["inspect", "quantize_rows"], "Missing option '--target'"),
        (["compile", "--target", "sm90", "--out", "out", "--problem", "1x1x1 w=int9"], "int9"),
    ],
)
def test_a_bad_command_line_is_a_named_error(words: list[str], said: str) -> None:
    result = fxquant("kernels", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_candidate_that_does_not_compile_is_shown_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[KernelConfig] = []

    def facts(problem: Problem, config: KernelConfig, arch: Arch) -> Facts:
        made.append(config)
        if len(made) == 1:
            raise OutOfResources(300_000, 100_000, "shared memory")
        return facts_of(problem, config, arch)

    monkeypatch.setattr("fxquant.cli.inspecting.facts_of", facts)
    result = fxquant("kernels", "inspect", "quantize_rows", "--target", "sm90", "--problem", QUANTIZE, "--all")
    assert result.exit_code == 0, result.output
    assert "does not compile: OutOfResources" in result.output
    assert result.output.count("µs") >= len(made) - 1 > 0


def test_the_time_of_a_librarys_kernel_is_not_known() -> None:
    problem = "64x64x64 w=int8/channel x=int8/token"
    result = fxquant("kernels", "inspect", "int_mm", "--target", "sm90", "--problem", problem)
    assert result.exit_code == 0, result.output
    assert "not known" in result.output
    assert "unknown" in result.output


def test_what_stands_in_the_way_of_compiling_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    words = ["kernels", "compile", "--target", "sm90", "--problem", QUANTIZE, "--out"]
    result = fxquant(*words, str(file / "out"))
    assert (result.exit_code, "no folder can be made there" in result.output) == (2, True)
    result = fxquant(*words, str(tmp_path / "out"), "--at", "kernels")
    assert (result.exit_code, "give an absolute one" in result.output) == (2, True)
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        result = fxquant(*words, str(tmp_path / "out"))
    assert (result.exit_code, "Triton's interpreter compiles nothing" in result.output) == (2, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = fxquant("kernels", "list")
    assert (result.exit_code, "pip install triton" in result.output) == (2, True)


def test_compile_without_a_kernel_for_it_is_an_error(tmp_path: Path) -> None:
    problem = "8x8x8 op=quantize x=int8/token extra=batchnorm"
    result = fxquant("kernels", "compile", "--target", "sm90", "--out", str(tmp_path), "--problem", problem)
    assert result.exit_code == 2
    assert "NothingToCompile: nothing to compile for sm90" in result.output


def test_the_module_runs_as_the_script_does() -> None:
    command = [sys.executable, "-m", "fxquant.cli", "kernels", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quantize_rows" in done.stdout


def test_importing_the_package_imports_no_command_line() -> None:
    code = "import sys, fxquant; print(*(m for m in ('typer', 'triton', 'fxquant.cli') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
