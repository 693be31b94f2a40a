"""Marks of tests that run diffusers."""

from __future__ import annotations

import pytest

MARKS = [
    pytest.mark.usefixtures("quiet", "quiet_diffusers"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),  # schedulers
]
