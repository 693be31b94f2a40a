"""The comparison with other tools: what is timed, what is demanded of it, what is skipped and said."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.harness import Outcome, WrongAnswer, finish
from benchmarks.peers import choice, demands, kernels, limits, llama_cpp, models, one, ours, overhead, page, plots
from benchmarks.peers.absent import Absent, need
from benchmarks.peers.ours import FLOAT, OURS
from benchmarks.peers.subjects import SUBJECTS, Subject


def result(key: str, /, **times: tuple[float, float]) -> dict[str, Any]:
    """What one.py writes of one thread; `times` are milliseconds and errors by tool, `_` for a space."""
    tools = {
        name if "." in name else name.replace("_", " "): {
            "median": 1e-3 * time,
            "best": 1e-3 * time,
            "worst": 1e-3 * time,
            "rounds": 5,
            "error": error,
            "peak_mb": 1,
        }
        for name, (time, error) in times.items()
    }
    return {"key": key, "name": key, "threads": 1, "tools": tools}


def verdicts(found: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    outcome = Outcome("a", "b")
    demands.check(outcome, {(found["key"], found["threads"]): found})
    return {check.what.partition("thread(s): ")[2]: (check.value, check.ok) for check in outcome.checks}


def test_the_best_peer_is_beaten_only_at_equal_error() -> None:
    found = result(
        "decoder-128",
        float32_Inductor=(100, 0),
        fxquant_int8dq=(20, 0.02),
        fxquant_int4dq=(10, 0.2),
        OpenVINO_w8a8=(20.5, 0.05),
        torchao_int8wo=(90, 0.01),
        ONNX_Runtime_int8=(30, 0.0195),
        Quanto_int8=(1, 0.01),
    )
    rule = ": our quickest of no more error"
    assert verdicts(found) == {
        "fxquant int8dq (error 0.02), of float": ("5.00x", True),
        f"fxquant int8dq (error 0.02), of OpenVINO w8a8 (error 0.05){rule}": ("1.02x", False),
        "a recipe of ours of no more error, of torchao int8wo (error 0.01)": (
            "none; fxquant int8dq (error 0.02): 4.50x",
            False,
        ),
        f"fxquant int8dq (error 0.02), of ONNX Runtime int8 (error 0.0195){rule}": ("1.50x", True),
    }


def test_llama_cpp_is_held_against_the_recipe_of_its_width() -> None:
    times = {"float32_Inductor": (40, 0), "fxquant_int8dq": (10, 0.1), "fxquant_int4wo": (8, 0.5)}
    llama = {"llama.cpp Q8_0": (10.5, 0.1), "llama.cpp Q4_0": (9.6, 0.6)}
    found = result("smollm2-step", **times, **llama)
    assert verdicts(found) == {
        "fxquant int8dq (error 0.1), of float": ("4.00x", True),
        "fxquant int4wo (error 0.5), of float": ("5.00x", True),
        "fxquant int8dq (error 0.1), of llama.cpp Q8_0 (error 0.1)": ("1.05x", False),
        "fxquant int4wo (error 0.5), of llama.cpp Q4_0 (error 0.6)": ("1.20x", True),
    }
    assert verdicts(result("smollm2-prefill", **times, **llama)) == {
        "fxquant int8dq (error 0.1), of float": ("4.00x", True),
        "fxquant int8dq (error 0.1), of llama.cpp Q4_0 (error 0.6)": ("0.96x", False),
    }


def test_an_absent_tool_is_said_and_leaves_no_demand() -> None:
    with pytest.raises(Absent, match="no_such_package is not installed"):
        need("no_such_package.part")
    found = result("minilm", float32_Inductor=(10, 0))
    found["tools"]["OpenVINO w8a8"] = {"skipped": "openvino is not installed"}
    lines = list(demands.skipped({("minilm", 1): found}))
    assert lines == ["skipped: OpenVINO w8a8, minilm, 1 thread(s): openvino is not installed"]
    assert not verdicts(found)


def test_a_peer_that_fails_is_skipped_and_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Subject, threads: int) -> Any:
        raise ValueError("cannot export\nmore")

    subject = Subject("linear", nn.Linear(4, 4), (torch.randn(1, 4),), ())
    ours = next(iter(OURS))
    monkeypatch.setattr(one, "TOOLS", {"peer": broken, ours: broken})
    assert one.build("peer", subject, 1, torch.zeros(1)) == ({"skipped": "ValueError: cannot export"}, None)
    with pytest.raises(ValueError, match="cannot export"):
        one.build(ours, subject, 1, torch.zeros(1))


def test_turns_rewind_before_every_call_and_give_each_the_same_rounds() -> None:
    calls: list[str] = []
    fns = {"a": lambda: torch.tensor(calls.append("a") is None), "b": lambda: torch.tensor(calls.append("b") is None)}
    stats = one.turns(fns, lambda: calls.append("rewind"), 0.0, 3)
    assert calls == ["rewind", "a", "rewind", "a", "rewind", "b", "rewind", "b"] * 3
    assert {name: s.rounds for name, s in stats.items()} == {"a": 3, "b": 3}


def test_memory_sees_the_peak_that_was_let_go() -> None:
    with one.Memory() as memory:
        torch.ones(32 * 2**20)  # 128 MB
    assert 100 < memory.peak < 400


def test_llama_cpp_reads_language_models_only() -> None:
    pytest.importorskip("llama_cpp")
    subject = Subject("linear", nn.Linear(4, 4), (torch.randn(1, 4),), ())
    with pytest.raises(Absent, match="GGUF files of language models"):
        llama_cpp.llama_cpp("Q8_0", subject, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_read_loop_reads_every_byte(threads: int) -> None:
    buffers = [torch.arange(1024, dtype=torch.int64), torch.full((512,), 3, dtype=torch.int64)]
    library = limits._library()
    assert library.read_all(buffers[0].data_ptr(), buffers[0].nbytes) == int(buffers[0].sum())
    seen: list[tuple[int, int]] = []

    class Recorder:
        def read_all(self, start: int, count: int) -> None:
            seen.append((start, count))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "_library", Recorder)
        limits.read_loop(buffers, threads)()
    assert sum(count for _, count in seen) == sum(buffer.nbytes for buffer in buffers)
    assert len({start for start, _ in seen}) == len(seen) == 2 * threads


def test_the_product_loop_does_the_operations_it_is_asked_for() -> None:
    library = limits._library()
    if not library.dot_products(1):
        with pytest.raises(Absent, match="no AVX512-VNNI"):
            limits.product_loop(1, 1)
        return
    assert library.dot_products(1000) == 1000 * 16 * 64 * 2
    limits.product_loop(1 << 20, 2)()


def test_overhead_is_that_of_a_step_whose_kernels_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome("a", "b")
    monkeypatch.setattr(overhead, "quantized", lambda config, subject, threads: lambda: subject.model(*subject.inputs))
    monkeypatch.setattr(overhead, "float_inductor", lambda subject, threads: lambda: subject.model(*subject.inputs))
    with pytest.raises(WrongAnswer, match="fxquant::int8_linear_dynamic"):
        overhead.measure(outcome, 1, overhead.EMPTY, 1, 0.0)
    monkeypatch.setattr(overhead, "OURS", "aten::mm")
    for width in (overhead.EMPTY, overhead.REAL):
        overhead.measure(outcome, 1, width, 1, 0.0)
    assert [figures["width"] for figures in outcome.figures] == [16, 256]
    (only,) = outcome.checks  # the demand is of the step without kernels alone
    assert "width 16" in only.what
    assert only.demand == "<= 1.1x"


def test_a_model_that_comes_too_late_is_not_measured_and_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> str:
        raise AssertionError(arguments)

    monkeypatch.setattr(models, "run", fail)
    chosen = argparse.Namespace(subjects=["minilm"], quick=False, seconds=1.0, minutes=0.0, results=tmp_path)
    assert models.main(chosen) == 1
    checks = json.loads((tmp_path / "peers.models.json").read_text())["checks"]
    assert [check["what"] for check in checks] == ["minilm, 1 thread(s)", "minilm, 2 thread(s)"]
    assert all(check["value"].startswith("not measured") and not check["ok"] for check in checks)


def test_every_model_has_its_tools_and_those_of_its_demands() -> None:
    assert set(choice.TOOLS) == set(SUBJECTS) >= set(choice.TWO_THREADS)
    for key, tools in [*choice.TOOLS.items(), *choice.TWO_THREADS.items()]:
        assert set(tools) <= set(one.TOOLS)
        assert tools[0] == FLOAT
        assert len(set(tools)) == len(tools)
        assert key not in demands.FLOORS_INT8 or demands.INT8 in tools
        assert key not in demands.FLOORS_INT4 or set(demands.INT4) & set(tools)
        assert key not in demands.BEST_PEER or all(any(t.startswith(p) for t in tools) for p in demands.PEERS)


def test_the_page_lists_what_must_hold_and_what_is_missing(tmp_path: Path) -> None:
    outcome = Outcome("peers.sizes", "Odd sizes")
    outcome.add({"case": "a", "cost": "1.1x"})
    outcome.at_most("cheap", 1.5, 1.3)
    outcome.at_most("cheaper", 1.2, 1.3)
    outcome.notes.append("skipped: OpenVINO: it is not installed")
    finish(outcome, argparse.Namespace(results=tmp_path, quick=False))
    text = page.page(tmp_path)
    assert "1 of 2 hold." in text
    assert "Missing from the list: peers.kernels, peers.models, peers.overhead, peers.eager." in text
    assert "| cheap | 1.50x | <= 1.3x | **does not hold** | peers.sizes |" in text
    assert "| cheaper | 1.20x | <= 1.3x | holds | peers.sizes |" in text
    assert "- skipped: OpenVINO: it is not installed" in text


def test_without_the_library_nothing_of_ours_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.cpu_kernels, "load", lambda: None)
    with pytest.raises(ours.NoKernels, match="could not be built"):
        ours.with_kernels()


def test_pictures_are_drawn(tmp_path: Path) -> None:
    points = [plots.Point(tool, rows, 2.0 * rows, 10.0 * rows) for tool in ("fxquant int8dq", FLOAT) for rows in (1, 8)]
    plots.roofline(points, 1e10, 4e11, tmp_path / "roofline.png")
    plots.models([result("minilm", float32_Inductor=(10, 0), OpenVINO_w8a8=(5, 0.1))], tmp_path / "models.png")
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_point_counts_two_operations_a_weight_and_row() -> None:
    point = kernels._point("x", 4, 0.001, 0.5)
    assert point.intensity == 16
    assert point.gops == pytest.approx(2 * 4 * kernels.SIZE**2 / 0.001 / 1e9)


@pytest.mark.slow
def test_one_model_in_float_and_ours(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.peers.one", "--subject", "decoder-1", "--json", str(path)]
    subprocess.run([*command, "--seconds", "0.5", "--tools", FLOAT, "fxquant int8dq"], check=True)
    (found,) = json.loads(path.read_text())
    tools = found["tools"]
    assert tools[FLOAT]["error"] < 1e-4 < tools["fxquant int8dq"]["error"] < 0.1
    assert all(tool["best"] <= tool["median"] <= tool["worst"] for tool in tools.values())
