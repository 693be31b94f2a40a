"""Kernels by Triton's interpreter, in a process of their own: a kernel decorated under it can't be compiled."""

from __future__ import annotations

import pytest

from fxquant.triton_kernels.launching import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if interpreted():
        return
    skip = pytest.mark.skip(reason="runs under TRITON_INTERPRET=1, as `make test` calls it")
    for item in items:
        if "tests/triton/" in str(item.path):
            item.add_marker(skip)
