"""Perplexity and divergence, on guesses whose figures are known; where the texts come from."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch

from demo import debian, texts
from demo.language import divergence, log_probabilities, perplexity, windows


def test_windows_lie_evenly_apart_and_hold_neighbours() -> None:
    found = windows(range(1000), count=2, tokens=10)
    assert found.shape == (2, 10)
    assert (found.diff(dim=1) == 1).all()
    assert found[1, 0] - found[0, 0] == 495
    with pytest.raises(ValueError, match="15 tokens has not 8 pieces of 10"):
        windows(range(15), count=8, tokens=10)


def test_a_uniform_guess_is_as_perplexed_as_there_are_words() -> None:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    uniform = torch.full((2, 9, 50), -math.log(50))
    assert perplexity(uniform, ids) == pytest.approx(50)


def test_a_model_that_knows_the_next_token_is_not_perplexed() -> None:
    ids = torch.tensor([[3, 1, 2, 0], [0, 2, 1, 3]])

    def model(x: torch.Tensor) -> torch.Tensor:
        return 100 * torch.nn.functional.one_hot(x.roll(-1, 1), 4).float()

    assert perplexity(log_probabilities(model, ids), ids) == pytest.approx(1)


def test_divergence_is_that_of_the_formula() -> None:
    exact, guess = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    p, q = (one.log().expand(1, 3, 2) for one in (guess, exact))
    assert divergence(p, q) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert divergence(q, q) == 0


def test_texts_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr(texts, "SOURCES", {"a text": lambda work: fetched.append(work) or "words"})
    assert texts.load_texts(tmp_path) == texts.load_texts(tmp_path) == {"a text": "words"}
    assert len(fetched) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a-text.txt"]


def test_without_an_archive_the_readme_is_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(command: list[str], **kwargs: object) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="E: no network\n")

    monkeypatch.setattr(debian.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(debian.subprocess, "run", fail)
    assert list(texts.load_texts(tmp_path)) == ["README"]
    assert "no network" in caplog.text
