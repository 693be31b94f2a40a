"""SmolLM2-135M-Instruct: how well it knows two texts, and how far its guesses are from those of float.

Its float weights here are a dequantized 4-bit grid (benchmarks/peers/smollm2.py): everything is relative to them. The
output layer, whose table is the embedding's, stays float as in the founders' figures, where a row says nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.accuracy.metrics import sqnr
from benchmarks.accuracy.subject import SQNR, Forward, Metric, Outputs, Subject
from benchmarks.peers import smollm2
from demo.language import TOKENS, WINDOWS, divergence, log_probabilities, perplexity, windows
from demo.texts import load_texts

HEAD = "*lm_head"


class Logits(nn.Module):
    """The model without a cache as a function of ids. Its head has a table of its own, apart from the embedding's."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        head = lm.get_submodule("lm_head")
        assert isinstance(head, nn.Linear)
        head.weight = nn.Parameter(head.weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [batch, tokens] -> float32 [batch, tokens, vocabulary]."""
        return self.lm(input_ids=ids, use_cache=False).logits


def subject(quick: bool = False) -> Subject:
    """The model and 1,024 tokens of each text (`quick`: 64)."""
    from tokenizers import Tokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer.from_file(str(smollm2.folder() / "tokenizer.json"))
    texts = load_texts()
    tokens = TOKENS // 16 if quick else TOKENS
    ids = {name: windows(tokenizer.encode(text).ids, tokens=tokens) for name, text in texts.items()}

    def run(model: Forward) -> Outputs:
        return {name: log_probabilities(model, one) for name, one in ids.items()}

    def score(got: Outputs, want: Outputs) -> dict[str, float]:
        found = {f"perplexity {name}": perplexity(got[name], one) for name, one in ids.items()}
        found["kl"] = sum(divergence(got[name], want[name]) for name in ids) / len(ids)
        every = [torch.cat([one[name].flatten() for name in ids]) for one in (got, want)]
        return found | {"sqnr": sqnr(every[0], every[1])}

    return Subject(
        name="smollm2",
        title="SmolLM2-135M (language model)",
        source="SmolLM2-135M-Instruct from a dequantized Q4_1 file; "
        f"{WINDOWS * tokens} tokens each of {', '.join(ids)}, in pieces of {tokens}; "
        "the output layer float but where a row says otherwise",
        timed_as=f"one pass of {tokens} tokens",
        metrics=(
            Metric("kl", "KL to float", 4, is_less_better=True),
            *(Metric(f"perplexity {name}", f"perplexity, {name}", 2, is_less_better=True) for name in ids),
            SQNR,
        ),
        model=Logits(smollm2.load()).eval().requires_grad_(False),
        run=run,
        score=score,
        timed=(next(iter(ids.values()))[:1],),
        exclude=HEAD,
        is_frozen=True,
    )
