"""float8 on devices for which torch has no such dtype: the CPU plays one of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxquant
from fxquant import numerics
from fxquant.nn import base as nn_base
from fxquant.nn import embedding as nn_embedding
from fxquant.nn import forms
from fxquant.nn import kernels as nn_kernels
from fxquant.numerics import held
from fxquant.ops import reference
from fxquant.pipeline import quantize_graph
from fxquant.report import ModelReport
from fxquant.runner import Deciding
from fxquant.spec import FORMATS, QuantConfig, TensorSpec
from fxquant.target import Target
from tests.lowering.helpers import call_bound, original_arguments
from tests.passes.helpers import X, capture

FLOAT8 = [name for name, number in FORMATS.items() if name.startswith("float8")]
PRESETS = ("fp8dqrow", "mxfp8", "nvfp4", "mxfp6wo")


class NoFloat8(TorchDispatchMode):
    """Raises where a float8 tensor is made, as such a device does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype.itemsize == 1 and leaf.dtype.is_floating_point:
                raise TypeError(f"{func} made a tensor of {leaf.dtype}")
        return result


@pytest.fixture(autouse=True)
def tables() -> None:
    """The tables of values are made on the CPU, which has every dtype, once; here it plays the other device too."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        held.byte_values(dtype, torch.device("cpu"))


@pytest.mark.parametrize("name", FLOAT8)
def test_every_value_of_a_format_has_its_byte(name: str) -> None:
    number = FORMATS[name]
    codes = torch.arange(256).to(torch.uint8)
    values = codes.view(number.storage).float()
    finite = values.isfinite()
    assert torch.equal(held.float8_bytes(values[finite], number), codes[finite])
    table = held.byte_values(number.storage, torch.device("cpu"))
    torch.testing.assert_close(table, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FLOAT8)
def test_bytes_are_rounded_as_torch_rounds(name: str) -> None:
    number = FORMATS[name]
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 5, 20000, base=2)
    values = torch.cat([values, torch.tensor([0.0, -0.0, number.qmax, number.qmin])]).clamp(number.qmin, number.qmax)
    assert torch.equal(held.float8_bytes(values, number), values.to(number.storage).view(torch.uint8))


@pytest.mark.parametrize("text", ["float8_e4m3fn/token", "float8_e5m2/group16", "mxfp8", "mxfp4", "nvfp4"])
def test_ops_give_the_bits_that_they_give_elsewhere(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec.parse(text)
    want = reference.quantize_dynamic(X, text)
    value = reference.fake_quantize(X, text)
    monkeypatch.setattr(held, "WITHOUT_FLOAT8", ["cpu"])
    got = reference.quantize_dynamic(X, text)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other.view(one.dtype))
    assert torch.equal(reference.fake_quantize(X, text), value)
    whole = got[2] if spec.has_tensor_scale else None
    assert torch.equal(reference.dequantize(got[0], got[1], None, text, torch.float32, whole), value)
    rows = reference.pack_rows(got[0], text)
    assert torch.equal(reference.decode_rows(rows, got[1], None, whole, X.shape[1], text, torch.float32), value)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)
        self.table = nn.Embedding(5, 16)

    def forward(self, indices: Tensor, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x + self.table(indices))))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_graph_makes_no_float8_tensor_there(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = QuantConfig(preset, rules={"table": preset if preset.endswith("wo") else "fp8wo"})
    inputs = (torch.tensor([0, 4, 1, 2, 2]), X)
    captured = capture(Model(), *inputs)
    args = original_arguments(captured, inputs)
    outputs = []
    for device in ("cpu", "mps"):
        if device == "mps":
            monkeypatch.setattr(held, "WITHOUT_FLOAT8", ["cpu"])
        copy = captured.copy()
        lowered = quantize_graph(copy, config, Deciding(config), target=Target(device), evaluate=False)
        with NoFloat8() if device == "mps" else torch.no_grad():
            outputs.append(call_bound(lowered.gm, lowered.binding, args)[0])
    assert torch.equal(*outputs)
    words = str(ModelReport.of_graphs([lowered.report]))
    assert "no kernels for mps: runs as dequantize + linear" in words
    assert "no kernels for mps: runs as dequantize + embedding" in words


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_fakes_on_other_devices_hold_what_these_can(device: str) -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 64, device=device)
        codes, scale, _ = torch.ops.fxquant.quantize_dynamic(x, "mxfp8")
        value = torch.ops.fxquant.dequantize(codes, scale, None, "mxfp8", torch.float16)
    dtypes = (torch.uint8, torch.uint8) if device == "mps" else (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    assert ((codes.dtype, scale.dtype), value.device.type) == (dtypes, device)


def test_numbers_are_held_in_their_own_dtype_elsewhere() -> None:
    codes = numerics.encode(X, numerics.given_scales(torch.ones(())), TensorSpec.parse("float8_e4m3fn/tensor")).codes
    assert codes.dtype == torch.float8_e4m3fn


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(5, 48), nn.Linear(48, 130), nn.Linear(130, 8)

    def forward(self, indices: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.table(indices))))


def frozen_rows(preset: str) -> Rows:
    torch.manual_seed(0)
    model = Rows()
    fxquant.quantize(model, preset=preset, rules={"table": preset if preset.endswith("wo") else "mxfp8wo"})
    fxquant.freeze(model)
    return model


@pytest.mark.parametrize("preset", [*PRESETS, "fp8wo", "fp8dq", "mxfp8wo", "nvfp4wo"])
def test_frozen_modules_make_no_float8_tensor_there(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (nn_base, forms, nn_kernels, nn_embedding):
        monkeypatch.setattr(module, "_FXQUANT", reference)  # the CPU's kernels read float8, another device has none
    indices, model = torch.tensor([0, 4, 1, 2, 2]), frozen_rows(preset)
    stored = model.state_dict()
    with torch.no_grad():
        want = model(indices)
    weight = model.a.weight.clone()
    moved, loaded = copy.deepcopy(model), frozen_rows(preset)
    monkeypatch.setattr(held, "WITHOUT_FLOAT8", ["cpu"])
    as_stored = {name: t.view(torch.uint8) if t.dtype.itemsize == 1 else t for name, t in stored.items()}
    with torch.no_grad(), NoFloat8():
        assert torch.equal(moved.to("cpu")(indices), want)
        assert torch.equal(moved.a.weight.clone(), weight)
        back = moved.state_dict()
        for given in (as_stored, stored):  # as torch.load maps them there, and from a CPU
            loaded.load_state_dict(given)
            assert torch.equal(loaded(indices), want)
    monkeypatch.setattr(held, "WITHOUT_FLOAT8", [])
    again = frozen_rows(preset)
    again.load_state_dict(back)
    assert all(torch.equal(t, stored[name]) for name, t in again.state_dict().items())
