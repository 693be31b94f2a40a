"""Large outputs lie in huge pages: without them a page fault for every 4 KiB takes longer than the product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 1 << 20


def asked_for_huge_pages(tensor: Tensor) -> bool:
    """Whether the kernel notes, of the mapping that the tensor's middle lies in, that huge pages are wanted."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= middle < end
        elif inside and head == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError(f"no mapping holds {middle:#x}")


@pytest.mark.skipif(not SETTING.exists(), reason="this system has no transparent huge pages")
def test_a_large_output_lies_in_huge_pages(kernels: object) -> None:
    out_features, in_features = 2048, 8
    packed = torch.ops.fxquant.int8_pack(torch.ones(out_features, in_features, dtype=torch.int8))
    x = torch.ones(
        64 * MIB // (4 * out_features), in_features
    )  # beyond what malloc keeps for itself: a mapping of its own
    y = torch.ops.fxquant.int8_linear_dynamic(x, packed, torch.ones(out_features), None, in_features, 0)
    assert y.nbytes == 64 * MIB
    assert asked_for_huge_pages(y)
    assert not asked_for_huge_pages(torch.empty(64 * MIB, dtype=torch.uint8)), "torch's own would pass as well"
