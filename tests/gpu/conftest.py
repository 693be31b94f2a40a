"""What needs a GPU: marked `gpu`, collected everywhere, skipped where there is none.

The checks themselves are functions of a device in modules of this folder. `tests/triton/test_gpu_checks.py` and
`tests/test_gpu_checks.py` run them on a CPU with small sizes, so that a first GPU meets no silly mistake.
"""

from __future__ import annotations

import pytest
import torch

from fxquant.target import ARCHS, Arch, Target


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/gpu/" in str(item.path)]
    absent = pytest.mark.skip(reason="no CUDA device")
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(absent)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU of these tests."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def arch(device: torch.device) -> Arch:
    """What our kernels are compiled for on that GPU."""
    name = Target.of_this_machine(device).arch
    if not name:
        pytest.skip(f"no architecture of ours runs on {torch.cuda.get_device_name(device)}")
    return ARCHS[name]
