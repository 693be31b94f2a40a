"""Trained weights come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers.smollm2 import FOLDER

transformers: Any = pytest.importorskip("transformers")


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
