"""How well a language model knows a text: perplexity, and how far its guesses are from another model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOKENS, WINDOWS = 512, 2  # of each text


def windows(ids: Sequence[int], count: int = WINDOWS, tokens: int = TOKENS) -> Tensor:
    """int64 [count, tokens]: pieces of a text's ids from places that lie evenly apart."""
    step = (len(ids) - tokens) // count
    if step < 1:
        raise ValueError(f"a text of {len(ids)} tokens has not {count} pieces of {tokens}")
    first = step // 3
    return torch.tensor([ids[at : at + tokens] for at in range(first, first + count * step, step)])


@torch.no_grad()
def log_probabilities(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """float32 [windows, tokens, vocabulary], one window at a time. model: ids [1, tokens] to logits."""
    return torch.cat([model(one[None]).float().log_softmax(-1) for one in ids])


def perplexity(log_p: Tensor, ids: Tensor) -> float:
    """exp of the mean surprise at each next token; log_p [windows, tokens, vocabulary], ids int64 [windows, tokens]."""
    return log_p[:, :-1].gather(-1, ids[:, 1:, None]).double().mean().neg().exp().item()


def divergence(log_p: Tensor, exact: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the guesses from those of `exact`, in nats; both [windows, tokens, words]."""
    each = [(q.exp() * (q - p)).sum(-1).double().mean() for p, q in zip(log_p, exact, strict=True)]
    return torch.stack(each).mean().item()
