"""Every op of fxquant on the GPU, by its kernel or its reference there, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import ops as checks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", checks.CASES)
def test_op(name: str, dtype: torch.dtype, device: torch.device) -> None:
    checks.check_op(name, dtype, device)
