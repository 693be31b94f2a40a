"""How far a random weight is from its codes: Quanto 0.2.7's figures (N(0, 1), 1024 x 1024), met or bettered."""

from __future__ import annotations

import pytest
import torch

from fxquant.algorithms import quantize
from fxquant.numerics import decode
from fxquant.spec import TensorSpec

# Measured with Quanto, in the scheme that it uses; the last digit printed is what it was rounded to.
QUANTO = {
    "int8/channel": 0.0079,
    "float8_e4m3fn/channel": 0.0264,
    "float8_e5m2/channel": 0.0526,
    "int4/group32/shift": 0.0783,
    "int4/group64/shift": 0.0896,
    "int4/group128/shift": 0.0998,
    "int4/channel/shift": 0.1256,
    "int2/group128/shift": 0.501,
}


def relative_error(text: str, seed: int) -> float:
    torch.manual_seed(seed)
    w, spec = torch.randn(1024, 1024), TensorSpec.parse(text)
    found = quantize(w, spec)
    values = decode(found.codes, found.scale, found.zero_point, spec, torch.float32, found.tensor_scale)
    return ((values - w).norm() / w.norm()).item()


@pytest.mark.parametrize(("text", "theirs"), QUANTO.items())
def test_error_is_quantos_or_less(text: str, theirs: float) -> None:
    digits = 3 if theirs > 0.2 else 4
    errors = [relative_error(text, seed) for seed in range(3)]
    assert round(sum(errors) / 3, digits) <= theirs


def test_finer_granules_and_more_bits_are_better() -> None:
    for worse, better in [
        ("int4/channel/shift", "int4/group128/shift"),
        ("int4/group128/affine/bf16", "int4/group32/affine/bf16"),
        ("fp4_e2m1/channel", "mxfp4"),
        ("mxfp4", "nvfp4"),
        ("mxfp4", "mxfp6"),
        ("fp6_e3m2/channel", "fp6_e2m3/channel"),
        *((f"int{bits}/channel", f"int{bits + 1}/channel") for bits in range(2, 8)),
    ]:
        assert relative_error(better, 0) < relative_error(worse, 0)
