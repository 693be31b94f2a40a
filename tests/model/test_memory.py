"""What a model takes in memory while it is frozen and after: anonymous pages of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxquant

# Run in a fresh process: RssAnon of one that has run other tests says nothing. Prints bytes above the start.
SCRIPT = """
import ctypes, json, sys, threading, time
import torch
from torch import nn
import fxquant
torch.set_num_threads(1)
libc = ctypes.CDLL("libc.so.6")
def anon():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
def settled():
    libc.malloc_trim(0)
    return anon()
LAYERS, SIZE, recipe, compiled = 6, 2048, sys.argv[1], sys.argv[2]
warm = nn.Linear(256, 256)
fxquant.quantize(warm, recipe); fxquant.freeze(warm)
x = torch.randn(2, SIZE)
with torch.no_grad():
    warm(torch.randn(2, 256))
    if compiled != "eager":
        small = nn.Sequential(nn.Linear(64, 64))
        fxquant.quantize(small, recipe); fxquant.freeze(small)
        torch.compile(small, backend=compiled)(torch.randn(2, 64))
start = settled()
model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
as_float = settled() - start
fxquant.quantize(model, recipe)
peak, stop = [anon()], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anon()); time.sleep(0.0005)
thread = threading.Thread(target=watch); thread.start()
fxquant.freeze(model)
stop.set(); thread.join()
frozen = settled() - start
run = model if compiled == "eager" else torch.compile(model, backend=compiled)
with torch.no_grad():
    run(x)
    run(x)
called = settled() - start
print(json.dumps({"float": as_float, "peak": peak[0] - start, "frozen": frozen, "called": called,
                  "footprint": fxquant.memory_footprint(model), "layer": SIZE * SIZE * 4}))
"""


def measured(recipe: str, compiled: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, recipe, compiled], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
def test_freezing_peaks_one_layer_above_the_float_model(recipe: str) -> None:
    found = measured(recipe, "eager")
    slack = 2 << 20  # what an allocator and a thread's stack may take
    assert found["peak"] <= found["float"] + found["layer"] + slack
    # Resident once: nothing is added by the first call.
    assert found["frozen"] <= found["footprint"] * 1.02 + slack
    assert found["called"] <= found["footprint"] * 1.02 + 2 * slack
    assert found["frozen"] < 0.3 * found["float"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "fxquant"])
def test_a_compiled_call_keeps_no_second_form(backend: str) -> None:
    found = measured("int8dq", backend)
    # The graph's own code and guards are memory too; a second form of the weights would be 25 MB.
    assert found["called"] <= found["footprint"] + (12 << 20)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp6_e3m2", "mxfp4", "nvfp4"])
def test_the_footprint_is_that_of_the_format(weights: str) -> None:
    model = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512, bias=False))
    before = fxquant.memory_footprint(model)
    assert before == 4 * (2 * 512 * 256 + 256)
    report = fxquant.quantize(model, weights=weights)
    assert fxquant.memory_footprint(model) == before
    fxquant.freeze(model)
    assert fxquant.memory_footprint(model) == pytest.approx(report.bytes_after + 4 * 256, rel=0.02)


def test_what_is_shared_counts_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, shared, nn.Linear(64, 64))
    model[2].weight = shared.weight
    assert fxquant.memory_footprint(model) == 4 * (64 * 64 + 2 * 64)
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    assert fxquant.memory_footprint(model) == 64 * 64 + 4 * 64 + 4 * 2 * 64
    assert torch.equal(model[2].weight, shared.weight)
