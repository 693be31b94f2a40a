"""Dequantized weights against torchao's and optimum-quanto's, where their definition is ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.numerics import decode, pack_codes_rows
from fxquant.spec import TensorSpec
from tests.numerics.peer_weights import weight
from tests.twins import U, assert_same_bits

TORCHAO = ["int8/channel", "float8_e4m3fn/channel", "float8_e5m2/channel", "nvfp4"]
TORCHAO_MX = ["mxfp8", "mxfp8_e5m2", "mxfp4"]
QUANTO = [
    *(f"int{bits}/group{size}/shift" for bits in (4, 2) for size in (32, 64, 128)),
    *("int8/channel", "float8_e4m3fn/channel", "float8_e5m2/channel"),
]


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("peers") / "weights"
    program = Path(__file__).parent / "peer_weights.py"
    done = subprocess.run([sys.executable, str(program), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


def ours(text: str) -> Tensor:
    spec = TensorSpec.parse(text)
    found = quantize(weight(), spec)
    return decode(found.codes, found.scale, found.zero_point, spec, torch.float32, found.tensor_scale)


def assert_same_codes(text: str, theirs: Tensor) -> None:
    """The same values up to float32 roundings, except at ties, where both values are as near as each other.

    They divide by the scale where we multiply by its reciprocal, and a shift is added before or after: a few roundings
    of numbers as large as the row's largest. More than that apart there is another code, which only a tie excuses.
    """
    mine, w = ours(text).double(), weight().double()
    rounding = 8 * U * w.abs().amax(1, keepdim=True)
    other = (mine - theirs.double()).abs() > rounding
    assert other.double().mean() < 1e-3
    away = (mine - w).abs() - (theirs.double() - w).abs()
    assert (away.abs() <= 2 * rounding)[other].all()


@pytest.mark.parametrize("text", TORCHAO)
def test_torchao_rounds_as_we_do(text: str, peers: dict[str, dict[str, Tensor]]) -> None:
    assert_same_codes(text, peers["torchao"][text])


@pytest.mark.parametrize("text", TORCHAO_MX)
def test_torchao_mx_in_floor_mode_is_ours_bit_for_bit(text: str, peers: dict[str, dict[str, Tensor]]) -> None:
    assert_same_bits(ours(text), peers["torchao"][text])


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4"])
def test_torchao_packs_four_bits_as_we_do(text: str, peers: dict[str, dict[str, Tensor]]) -> None:
    spec = TensorSpec.parse(text)
    packed = pack_codes_rows(quantize(weight(), spec).codes, spec)
    theirs = peers["torchao"][f"{text} packed"].view(packed.shape)
    assert (packed != theirs).double().mean() < (1e-3 if text == "nvfp4" else 1e-12)


@pytest.mark.parametrize("text", QUANTO)
def test_quanto_rounds_as_we_do(text: str, peers: dict[str, dict[str, Tensor]]) -> None:
    assert_same_codes(text, peers["quanto"][text])
