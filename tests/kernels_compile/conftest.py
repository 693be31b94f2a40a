"""Kernels compiled for GPUs that are not here. A process without the interpreter, which would be in the way."""

from __future__ import annotations

import pytest

from fxquant.triton_kernels.launching import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interpreted():
        return
    skip = pytest.mark.skip(reason="can't compile under TRITON_INTERPRET=1")
    for item in items:
        if "tests/kernels_compile/" in str(item.path):
            item.add_marker(skip)
