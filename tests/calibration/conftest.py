"""Every test here ends as it began."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch._dynamo import eval_frame

from fxquant.nn import recording


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert recording.ACTIVE == []
    assert eval_frame._stance.stance == "default"
