"""No side effects: torch's caches work across processes, and an import does nothing."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run_python(code: str, **environment: str) -> dict[str, Any]:
    """Run the code in a fresh process; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COMPILE = """
import hashlib, json, torch, fxquant
from torch import nn
from torch._dynamo.utils import counters
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval(), torch.randn(3, 64)
with torch.no_grad():
    y = torch.compile(model, backend="fxquant", fullgraph=True)(x)
found = {**counters["inductor"], **counters["aot_autograd"]}
print(json.dumps({"found": found, "output": hashlib.sha256(y.numpy().tobytes()).hexdigest()}))
"""


@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    cold = run_python(COMPILE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    warm = run_python(COMPILE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert cold["found"].get("fxgraph_cache_miss", 0) >= 1
    assert cold["found"].get("autograd_cache_miss", 0) >= 1
    assert warm["found"].get("autograd_cache_hit", 0) >= 1
    assert warm["found"].get("autograd_cache_miss", 0) == 0
    assert warm["found"].get("fxgraph_cache_miss", 0) == 0
    bypasses = [name for name in warm["found"] if "bypass" in name]
    assert not bypasses
    assert warm["output"] == cold["output"]


@pytest.mark.slow
def test_other_weights_and_other_specs_do_not_meet_in_the_cache(tmp_path: Path) -> None:
    """The graph holds no weight, so other weights may hit; another spec is another graph."""
    cold = run_python(COMPILE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    others = run_python(COMPILE.replace("manual_seed(0)", "manual_seed(1)"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    alone = run_python(COMPILE.replace("manual_seed(0)", "manual_seed(1)"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "n"))
    assert others["output"] == alone["output"] != cold["output"]
    spec = COMPILE.replace("fullgraph=True", "fullgraph=True, options={'preset': 'int8wo'}")
    assert run_python(spec, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))["output"] != cold["output"]


IMPORT = """
import json, pathlib, sys, time
import torch, torch._dynamo, torch._inductor.config
def settings():
    return {part: getattr(torch, part).config.save_config_portable() for part in ("_inductor", "_dynamo")}
before = settings()
opened = []
watching = [True]
def watch(event, args):
    if watching[0] and event in ("subprocess.Popen", "os.mkdir", "os.system", "socket.connect"):
        opened.append(f"{event} {args[0]}")
    if watching[0] and event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        opened.append(f"write {args[0]}")
sys.addaudithook(watch)
import fxquant
watching[0] = False
after = settings()
changed = [f"{part}.{k}" for part in before for k in before[part] if repr(before[part][k]) != repr(after[part][k])]
print(json.dumps({"changed": changed, "opened": opened, "inductor": "torch._inductor.compile_fx" in sys.modules}))
"""


def test_an_import_does_nothing(tmp_path: Path) -> None:
    """No setting of torch's changes, nothing is built or written, no process starts, Inductor is not loaded."""
    cache = tmp_path / "cache"
    # -B in the environment: Python itself would write byte code.
    found = run_python(IMPORT, FXQUANT_CACHE_DIR=str(cache), PYTHONDONTWRITEBYTECODE="1")
    assert found == {"changed": [], "opened": [], "inductor": False}
    assert not cache.exists()


def test_an_import_adds_little_to_torchs_own(tmp_path: Path) -> None:
    """CPU seconds, which neighbours on the machine disturb less than wall-clock. Measured: 0.2 s, half of it a
    collection of torch's garbage. Python's own byte code is kept, as it is for users: the first run makes it.
    """
    code = """
import time
import torch
started = time.process_time()
import fxquant
print(time.process_time() - started)
"""
    seconds = [
        float(run_python(code, PYTHONPYCACHEPREFIX=str(tmp_path), PYTHONDONTWRITEBYTECODE=""))  # pyright: ignore[reportArgumentType]
        for _ in range(4)
    ]
    assert statistics.median(seconds[1:]) < 0.3
