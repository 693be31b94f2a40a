"""transformers without its words: they are many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers says errors only, and draws no bars."""
    transformers: Any = pytest.importorskip("transformers")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def quiet_diffusers() -> Iterator[None]:
    """diffusers the same."""
    diffusers: Any = pytest.importorskip("diffusers")
    words = diffusers.utils.logging
    before = words.get_verbosity()
    words.set_verbosity_error()
    words.disable_progress_bar()
    yield
    words.set_verbosity(before)
    words.enable_progress_bar()
