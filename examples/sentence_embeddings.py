"""Search by meaning: which sentence is nearest to a question, by a quantized and compiled sentence encoder.

python -m examples.sentence_embeddings "how do I make a neural network smaller?"
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import fxquant

SENTENCES = (
    "The cat sleeps on the warm windowsill all afternoon.",
    "Quantization stores the weights of a network in fewer bits.",
    "Boil the pasta in salted water for nine minutes.",
    "The compiler turns a graph of operations into machine code.",
    "Rain is expected in the north by tomorrow evening.",
    "She plays the violin in the city's orchestra.",
)


class Encoder(nn.Module):
    """Token ids and mask [batch, tokens] to unit vectors: the mean over the real tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main(arguments: list[str] | None = None) -> tuple[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="How do I make a neural network smaller?")
    parser.add_argument("--preset", default="int8dq")
    parser.add_argument("--executor", default="inductor", choices=("inductor", "eager"))
    chosen = parser.parse_args(arguments)
    from examples.weights import sentence_encoder

    folder = sentence_encoder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact = Encoder(AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)).eval()
    encoder = fxquant.compile(exact, chosen.preset, executor=chosen.executor, fullgraph=True)

    texts = [chosen.question, *SENTENCES]
    tokens = tokenizer(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    inputs = tokens["input_ids"], tokens["attention_mask"]
    with torch.no_grad():
        vectors, float_vectors = encoder(*inputs), exact(*inputs)
    scores = vectors[1:] @ vectors[0]
    for score, sentence in sorted(zip(scores.tolist(), SENTENCES, strict=True), reverse=True):
        print(f"{score:6.3f}  {sentence}")
    cosine = nn.functional.cosine_similarity(vectors, float_vectors).mean().item()
    print(f"mean cosine between {chosen.preset} and float: {cosine:.4f}")
    return SENTENCES[int(scores.argmax())], cosine


if __name__ == "__main__":
    main()
