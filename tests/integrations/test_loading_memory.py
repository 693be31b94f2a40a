"""What quantizing while loading takes in memory: about what the quantized model does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.integrations import freed_memory

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys, torch, {library}
import fxquant
from benchmarks.saving import peak_of
from fxquant import FxQuantConfig

def load(folder):
    return {library}.{model}.from_pretrained(folder, quantization_config=FxQuantConfig(sys.argv[3]))

torch.set_num_threads(1)
load(sys.argv[1])  # what a first load makes once
peak, model = peak_of(lambda: load(sys.argv[2]))
print(json.dumps({{"peak": peak, "size": fxquant.memory_footprint(model)}}))
"""
BETWEEN = """
import json, torch
from benchmarks.saving import rss_anon
from fxquant.integrations.freed_memory import _EVERY, FreedMemory

large = torch.empty(_EVERY - 4096, dtype=torch.uint8)  # from here on glibc keeps what is freed
del large
kept, freed = [], []
for _ in range(100):
    freed.append(torch.ones(1 << 20, dtype=torch.uint8))
    kept.append(torch.ones(1 << 12, dtype=torch.uint8))
found = [rss_anon()]
freed.clear()
found.append(rss_anon())
memory = FreedMemory()
for _ in range(2):
    memory.add(_EVERY // 2)
    found.append(rss_anon())
print(json.dumps([*found, memory.waiting]))
"""


def decoder(layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 8000}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **sizes))


def diffuser(layers: int) -> Any:
    sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "sample_size": 16, "num_embeds_ada_norm": 10}
    return pytest.importorskip("diffusers").DiTTransformer2DModel(in_channels=4, num_layers=layers, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["int4wo", "int8dq"])
@pytest.mark.parametrize(("library", "make"), [("transformers", decoder), ("diffusers", diffuser)])
def test_a_load_peaks_at_the_quantized_size_and_the_largest_tensor(
    library: str, make: Any, preset: str, tmp_path: Path
) -> None:
    for layers, name in ((1, "small"), (24, "large")):
        with torch.device("meta"):
            model: Any = make(layers)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        model.save_pretrained(tmp_path / name)
        held, largest = (how(parameter.nbytes for parameter in model.parameters()) for how in (sum, max))
        kind = type(model).__name__
        del model
    script = MEASURE.format(library=library, model=kind)
    found = json.loads(inside(script, str(tmp_path / "small"), str(tmp_path / "large"), preset))
    assert 0.5 * found["size"] < found["peak"] <= 1.1 * found["size"] + largest < 0.5 * held, found


@pytest.mark.skipif(freed_memory._malloc_trim() is None, reason="this C library has no malloc_trim")
def test_what_lies_free_between_blocks_that_stay_goes_back() -> None:
    filled, cleared, half, whole, waiting = json.loads(inside(BETWEEN))
    assert cleared > filled - (20 << 20)  # glibc keeps it
    assert half > filled - (20 << 20)
    assert whole < filled - (80 << 20)
    assert waiting == 0


def inside(script: str, *arguments: str) -> str:
    """The last line that a process of its own prints: what lies free depends on all that a process did before."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]
