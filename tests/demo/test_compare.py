"""What the demo reads back from a dump, and the whole demo at reduced size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo.compare import Settings, Sizes, fresh_folder, sizes
from demo.minilm import SentenceEncoder

ROOT = Path(__file__).parents[2]


def site(op: str, kernel: str, before: int, after: int, members: int = 1) -> dict[str, object]:
    return {"op": op, "kernel": kernel, "bytes_before": before, "bytes_after": after, "members": members}


def test_sizes_are_those_of_the_first_graph_of_the_dump(tmp_path: Path) -> None:
    rows = [site("linear", "k", 300, 80, members=3), site("linear", "", 50, 50), site("embedding", "", 1000, 1000)]
    for name, sites in (("graph_000", rows), ("graph_001", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"sites": sites}))
    model = SentenceEncoder(torch.nn.Linear(100, 4, bias=False))  # 1600 bytes
    assert sizes(model, Settings(dump=tmp_path)) == Sizes((300, 80), (1600, 1380), {"k": 3}, 4)
    assert sizes(model, Settings(dump=tmp_path / "nothing")) is None


def test_each_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert [fresh_folder(tmp_path / "dumps").name for _ in range(2)] == ["run-000", "run-001"]


def test_a_stand_in_backend_gets_none_of_our_options() -> None:
    assert Settings(backend="inductor").options == {}
    assert set(Settings().options) == {"preset", "dump"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_and_the_quantized_model_is_as_good(tmp_path: Path) -> None:
    figures, dump = tmp_path / "figures.json", tmp_path / "dump"
    command = [sys.executable, "-m", "demo", "--pairs", "96", "--seconds", "0.2", "1"]
    command += ["--json", str(figures), "--dump", str(dump)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("latency, batch 1 ", "latency, batch 32", "weights, whole model", "retrieval, MRR", str(dump)):
        assert words in done.stdout
    found = json.loads(figures.read_text())
    assert found["sizes"]["kernels"] == {"int8_linear_dynamic": 30, "int8_linear_dynamic +gelu": 6}  # six layers of six
    before, after = found["sizes"]["layers"]
    # int8 codes are a quarter of the bytes; scales, biases and padding add a little
    assert before / 4 < after < before / 3.5
    # int8dq loses a few thousandths of cosine on this model (0.9966 measured); a wrong scale or a lost layer far more
    assert found["quality"]["cosine"] > 0.99
    # four standard errors of the difference, plus one query that falls from rank 1 to the end
    quality = found["quality"]
    assert abs(quality["quantized_mrr"] - quality["float_mrr"]) <= 4 * quality["mrr_error"] + 1 / quality["queries"]
    assert (dump / "run-000" / "graph_000" / "00-summary.txt").is_file()
