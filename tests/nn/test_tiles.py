"""Frozen weights in the layout of the Triton kernels: what a GPU would hold, computed here by the references."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.nn import devices
from fxquant.nn.base import QModule

INTEGERS = ("int8wo", "int8dq", "int4wo", "int4dq", "int2wo")
RECIPES = (*INTEGERS, "fp8dqrow", "fp8dq", "fp6_e3m2", "mxfp4wo", "nvfp4", "mxfp8")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the CPU count as a GPU of that architecture; '' makes it a CPU again."""

    def switch(arch: str) -> None:
        monkeypatch.setattr(devices, "arch_of", lambda device: arch)
        devices.multiplies_codes.cache_clear()

    yield switch
    devices.multiplies_codes.cache_clear()


def frozen(preset: str) -> tuple[QModule, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(160, 96)
    fxquant.quantize(model, preset=preset)
    fxquant.freeze(model)
    assert isinstance(model, QModule)
    return model, torch.randn(3, 160)


def as_bytes(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def layout(module: QModule) -> str:
    return module._forms["weight"].layout


@pytest.mark.parametrize("arch", ["sm80", "sm100"])
@pytest.mark.parametrize("preset", RECIPES)
def test_there_and_back(preset: str, arch: str, on_gpu: Any) -> None:
    module, x = frozen(preset)
    before, layout_before = copy.deepcopy(module.state_dict()), layout(module)
    with torch.no_grad():
        here = module(x)
        on_gpu(arch)
        module.to("cpu")  # any move settles
        assert layout(module) == ("blocks" if arch == "sm100" and preset in ("nvfp4", "mxfp8") else "tiles")
        there = module(x)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(as_bytes(before[key]), as_bytes(after[key])) for key in before)
    assert (here - there).norm() <= 1e-5 * here.norm()  # float sums in another order
    torch.testing.assert_close(module.weight, frozen(preset)[0].weight, rtol=0, atol=0)
    on_gpu("")
    with torch.no_grad():
        torch.testing.assert_close(module(x), here, rtol=0, atol=0)
    assert layout(module) == layout_before


def test_a_moved_module_rests_in_tiles_until_it_runs(on_gpu: Any) -> None:
    module, x = frozen("int8wo")
    on_gpu("sm90")
    module.to("cpu")
    on_gpu("")
    module.to("cpu")
    assert layout(module) == "tiles"
    module(x)
    assert layout(module) == "int8"


@pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn"])
def test_calibrated(activations: str, on_gpu: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(160, 96), torch.randn(5, 160)
    fxquant.quantize(model, weights="int8" if activations == "int8" else activations, activations=activations)
    with fxquant.Calibration(), torch.no_grad():
        model(x)
    fxquant.freeze(model)
    with torch.no_grad():
        here = model(x)
        on_gpu("sm90")
        there = model.to("cpu")(x)
    assert layout(model) == "tiles"  # pyright: ignore[reportArgumentType]
    assert (here - there).norm() <= 1e-5 * here.norm()


def test_a_state_dict_goes_to_either_layout(on_gpu: Any) -> None:
    module, x = frozen("int4wo")
    stored = module.state_dict()
    with torch.no_grad():
        here = module(x)
        on_gpu("sm90")
        other = nn.Linear(160, 96)
        fxquant.quantize(other, preset="int4wo")
        other.load_state_dict(stored)
        assert layout(other) == "tiles"  # pyright: ignore[reportArgumentType]
        assert (here - other(x)).norm() <= 1e-5 * here.norm()


@pytest.mark.parametrize("preset", ["int8wo", "int4wo", "int8dq", "fp8dqrow"])
def test_attention_reads_thirds_of_tiles(preset: str, on_gpu: Any) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(96, 4, batch_first=True)
    fxquant.quantize(model, preset=preset)
    fxquant.freeze(model)
    x, other = torch.randn(2, 5, 96), torch.randn(2, 7, 96)
    with torch.no_grad():
        here = [model(x, x, x)[0], model(x, other, other)[0]]
        on_gpu("sm90")
        model.to("cpu")
        assert isinstance(model, QModule)
        assert model._forms["in_proj_weight"].layout == "tiles"
        there = [model(x, x, x)[0], model(x, other, other)[0]]
        on_gpu("")
        back = [model(x, x, x)[0], model(x, other, other)[0]]
    for a, b, c in zip(here, there, back, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
        torch.testing.assert_close(a, c, rtol=0, atol=0)
