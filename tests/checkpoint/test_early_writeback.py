"""Every whole window of what was put into a file is handed to the system, once, as it fills up."""

from __future__ import annotations

import pytest

from fxquant.checkpoint import early_writeback
from fxquant.checkpoint.early_writeback import EarlyWriteback


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """The calls that the system gets; a window is 100 bytes."""
    calls: list[tuple[int, int, int, int]] = []

    def call(descriptor: int, offset: int, count: int, flags: int) -> int:
        calls.append((descriptor, offset, count, flags))
        return 0

    monkeypatch.setattr(early_writeback, "_EVERY", 100)
    monkeypatch.setattr(early_writeback, "_function", lambda: call)
    return calls


def test_neighbours_are_started_together(started: list[tuple[int, int, int, int]]) -> None:
    to_disk = EarlyWriteback(7)
    for offset in range(0, 240, 40):
        to_disk.note(offset, 40)
    assert started == [(7, 0, 120, 2), (7, 120, 120, 2)]


def test_a_jump_starts_what_was_before_it(started: list[tuple[int, int, int, int]]) -> None:
    to_disk = EarlyWriteback(7)
    to_disk.note(0, 40)
    to_disk.note(1000, 60)
    to_disk.note(1060, 60)
    assert started == [(7, 0, 40, 2), (7, 1000, 120, 2)]


def test_without_the_systems_function_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_writeback, "_EVERY", 1)
    monkeypatch.setattr(early_writeback, "_function", lambda: None)
    EarlyWriteback(-1).note(0, 5)
