"""A cache of plans for each test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of tuned plans: an empty one."""
    monkeypatch.setattr("fxquant.tuning.plans.cache.cache_dir", lambda: tmp_path)
    return tmp_path / "plans"
