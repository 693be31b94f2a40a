"""How good embeddings are at a task, and how near to other embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """Rank (1 = best) of document i among all documents for query i; both are unit vectors [n, width].

    A document that ties with the right one counts as before it, so a model that gives one vector for all scores
    the worst rank, not the best.
    """
    scores = queries @ documents.T
    return (scores >= scores.diagonal().unsqueeze(1)).sum(1)


def mean_reciprocal_rank(queries: Tensor, documents: Tensor) -> float:
    """Mean of 1 / rank; NaN where an embedding is not finite, since a rank among NaN means nothing."""
    if not (queries.isfinite().all() and documents.isfinite().all()):
        return float("nan")
    return ranks(queries, documents).double().reciprocal().mean().item()


def standard_error(queries: tuple[Tensor, Tensor], documents: tuple[Tensor, Tensor]) -> float:
    """Standard error of the difference of two models' mean reciprocal ranks, (first, second), query by query."""
    first, second = (ranks(q, d).double().reciprocal() for q, d in zip(queries, documents, strict=True))
    return ((first - second).std() / len(first) ** 0.5).item()


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine between rows of equal number, [n, width] both."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


def recall_at(queries: Tensor, documents: Tensor, count: int) -> float:
    """Share of the queries whose document is among the best `count`."""
    return (ranks(queries, documents) <= count).double().mean().item()
