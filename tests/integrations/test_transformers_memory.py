"""Larger models: what quantizing while loading takes in memory, and trained weights that come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers.smollm2 import FOLDER

transformers: Any = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 8000}
FLOAT_TABLE = 8000 * 512 * 4  # the largest tensor
MEASURE = """
import json, sys, torch
import fxquant
from benchmarks.saving import peak_of
from fxquant import FxQuantConfig
from transformers import LlamaForCausalLM

def load(folder):
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=FxQuantConfig(sys.argv[3]))

torch.set_num_threads(1)
load(sys.argv[1])  # what a first load makes once
peak, model = peak_of(lambda: load(sys.argv[2]))
print(json.dumps({"peak": peak, "size": fxquant.memory_footprint(model)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["int4wo", "int8dq"])
def test_quantizing_while_loading_takes_little_memory(preset: str, tmp_path: Path) -> None:
    for layers, name in ((1, "small"), (24, "large")):
        config = transformers.LlamaConfig(num_hidden_layers=layers, **SIZES)
        with torch.device("meta"):
            model: Any = transformers.LlamaForCausalLM(config)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        model.save_pretrained(tmp_path / name)
        held = sum(parameter.nbytes for parameter in model.parameters())
        del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), preset]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 * found["size"] < found["peak"] <= 1.1 * found["size"] + 2 * FLOAT_TABLE < 0.5 * held, found


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="SmolLM2 is not there; `make bench` gets it")
@pytest.mark.parametrize("preset", ["int8dq", "int4wo"])
def test_smollm2_comes_back_bit_for_bit_and_says_the_same(preset: str, tmp_path: Path) -> None:
    from fxquant import FxQuantConfig

    auto, tokens = transformers.AutoModelForCausalLM, torch.arange(100, 132)[None] * 37
    model = auto.from_pretrained(FOLDER, dtype=torch.float32, quantization_config=FxQuantConfig(preset))
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    found = []
    for one in (model, again):
        with torch.no_grad():
            logits = one(tokens).logits
        options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
        found.append((logits, one.generate(tokens, **options)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
