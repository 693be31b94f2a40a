"""Batching and pooling around the demo's model; the model itself is exercised by the slow run."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from demo import minilm
from demo.minilm import Batch, SentenceEncoder


class LetterCount:
    """A stand-in for the tokenizer: one token a sentence, its length."""

    def __call__(self, sentences: Sequence[str]) -> Batch:
        ids = torch.tensor([[len(s)] for s in sentences])
        return Batch(ids, torch.ones_like(ids))


class Lookup(nn.Module):
    """A stand-in for the transformer: hidden state = two numbers made from the token id."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.stack((input_ids.float(), torch.ones(input_ids.shape)), -1))


def test_batches_are_full_and_padding_rows_are_dropped() -> None:
    sizes: list[int] = []

    def model(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        sizes.append(input_ids.shape[0])
        return input_ids.double()

    done: list[int] = []
    rows = minilm.embed(model, LetterCount(), ["a", "bb", "ccc", "dddd", "eeeee"], size=2, advance=done.append)
    assert rows.tolist() == [[1], [2], [3], [4], [5]]
    assert rows.dtype == torch.float32
    assert sizes == [2, 2, 2]
    assert done == [2, 2, 1]


def test_pooling_is_the_mean_of_the_real_tokens_normalised() -> None:
    ids = torch.tensor([[3, 5, 100], [7, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    got = SentenceEncoder(Lookup())(ids, mask)
    want = torch.tensor([[4.0, 1.0], [7.0, 1.0]])
    torch.testing.assert_close(got, want / want.norm(dim=1, keepdim=True), rtol=1e-6, atol=0)


def test_a_row_without_tokens_is_finite() -> None:
    got = SentenceEncoder(Lookup())(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    assert got.tolist() == [[0.0, 0.0]]


def test_a_missing_package_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(minilm.DemoModelMissing, match="make setup"):
        minilm.model_folder()
