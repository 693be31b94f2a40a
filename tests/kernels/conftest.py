"""Fixtures of the tests of the C++ kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.cpu_helpers import ISAS, loaded, need_isa


@pytest.fixture(scope="session")
def kernels() -> None:
    """The library is built and registered; without a compiler the test is skipped."""
    loaded()


@pytest.fixture(params=ISAS, ids=list(ISAS.values()))
def isa(request: pytest.FixtureRequest) -> int:
    """Each instruction set that this CPU has, as the ops' argument."""
    return need_isa(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
