"""Checks of whole models on a device: compiled, with shapes that change and in CUDA graphs; moved; their memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.numerics.granules import DEVICE_BLOCK
from tests.models import Decoder, GatedMlp

# Kernels sum in another order than references: a code that flips by it costs much less than the rounding to codes does.
_SHARE_OF_NOISE = 0.5
# Tensors as large as a block of float32 that rounding needs at once: measured on the CPU with the device's blocks 8.5
# for small floats, 1 for integers.
_TEMPORARIES = 10


def decoder(width: int) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(width=width, hidden=5 * width // 2).eval()


def prompts(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (2, length), generator=generator) for length in lengths]


def check_preset(
    preset: str, device: torch.device, dtype: torch.dtype, width: int, *, dynamic: bool | None = None, **options: Any
) -> None:
    """A compiled decoder is as far from the float one as its references on the CPU say, at every length."""
    model = decoder(width)
    there = torch.compile(
        copy.deepcopy(model).to(device, dtype),
        backend="fxquant",
        dynamic=dynamic,
        options={"preset": preset, **options},
    )
    here = torch.compile(model, backend="fxquant", options={"preset": preset, "executor": "eager"})
    with torch.no_grad():
        for ids in prompts((9, 12, 17) if dynamic else (9,)):
            exact, wanted = model(ids), here(ids)
            got = there(ids.to(device)).float().cpu()
            noise = (wanted - exact).norm()
            if dtype == torch.float32:
                assert (got - wanted).norm() <= _SHARE_OF_NOISE * noise + 1e-5 * exact.norm()
            else:
                allowed = 1.5 * noise + 16 * torch.finfo(dtype).eps * exact.norm()
                assert (got - exact).norm() <= allowed


def check_replays(preset: str, device: torch.device, dtype: torch.dtype, width: int, **options: Any) -> None:
    """Called again and again with other numbers, a compiled model gives what its eager executor gives."""
    model = decoder(width).to(device, dtype)
    replayed = torch.compile(model, backend="fxquant", options={"preset": preset, **options})
    plain = torch.compile(copy.deepcopy(model), backend="fxquant", options={"preset": preset, "executor": "eager"})
    with torch.no_grad():
        for ids in prompts((9, 9, 9, 9, 9)):
            wanted, got = plain(ids.to(device)).float(), replayed(ids.to(device)).float().clone()
            assert (got - wanted).norm() <= 16 * torch.finfo(dtype).eps * wanted.norm() + 0.02 * wanted.norm()


def check_moves(preset: str, device: torch.device, width: int) -> None:
    """Quantized modules go to the device and come back with every bit; there they compute the same."""
    torch.manual_seed(0)
    model, x = GatedMlp(width, 2 * width), torch.randn(3, width)
    fxquant.quantize(model, preset)
    fxquant.freeze(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        here = model(x)
        model.to(device)
        assert {t.device.type for t in model.state_dict().values() if isinstance(t, Tensor)} == {device.type}
        there = model(x.to(device)).cpu()
        model.to("cpu")
        again = model(x)
    assert (there - here).norm() <= 0.01 * here.norm()
    assert torch.equal(again, here)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, t in before.items():
        now = after[name]
        assert (now.dtype, now.device.type) == (t.dtype, "cpu")
        assert torch.equal(now.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8)), name


def check_memory(preset: str, device: torch.device, width: int, peak_of: Callable[[Callable[[], None]], int]) -> None:
    """Moved there while it is quantized, a model never holds more on the device than its codes, one float layer, and
    what rounding a block of that layer takes.

    peak_of: the most bytes of memory of the device that a function allocates.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    one = width * width * 4

    def quantize() -> None:
        fxquant.quantize(model, preset, device=device)
        fxquant.freeze(model)

    peak, held = peak_of(quantize), fxquant.memory_footprint(model)
    spec = fxquant.PRESETS[preset].weights
    assert spec is not None
    assert held == pytest.approx(4 * spec.nbytes((width, width)), rel=0.02)
    assert peak <= held + one + _TEMPORARIES * min(one, 4 * DEVICE_BLOCK)
