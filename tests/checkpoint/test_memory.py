"""What a load takes in memory that no file stands behind: the quantized model and little more."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import saving


@pytest.mark.slow
@pytest.mark.parametrize("config", ["int8wo", "int4wo"])
def test_a_load_takes_the_quantized_size_a_tenth_and_the_largest_tensor(config: str, tmp_path: Path) -> None:
    found = saving.memory(config, 200, tmp_path)
    assert found["size"] > 150e6
    assert found["size"] <= found["peak"] <= found["allowed"], found
