"""QuantizedTensor: what it takes; its numbers are those of the ops (tests/test_ops_weights.py)."""

from __future__ import annotations

import pytest
import torch

from fxquant import QuantizedTensor, TensorSpec
from fxquant.errors import ShapeMismatch


def test_a_spec_may_be_text() -> None:
    weight, text = torch.randn(4, 200), "int4/group128/affine"
    found, wanted = QuantizedTensor.quantize(weight, text), QuantizedTensor.quantize(weight, TensorSpec.parse(text))
    assert found.spec == wanted.spec
    assert torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.parametrize("algorithm", ["auto", "mse"])
@pytest.mark.parametrize("shape", [(8,), (8, 3, 3)])
def test_only_matrices(shape: tuple[int, ...], algorithm: str) -> None:
    with pytest.raises(ShapeMismatch, match=r"a matrix \[N, K\]"):
        QuantizedTensor.quantize(torch.randn(shape), "int8/channel", algorithm)
