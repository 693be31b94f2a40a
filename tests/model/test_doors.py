"""Both doors are one house: the same ops on the same codes, and no float copy of a frozen weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.spec import PRESETS

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # at the import of torch._inductor
]
SHAPES = {(64, 128), (96, 64), (8, 3, 3, 3), (72, 8 * 9), (72, 8, 3, 3), (300, 128)}


class Net(nn.Module):
    """Linears, convolutions and a table; no two weights have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 128)
        self.up = nn.Linear(128, 64)
        self.out = nn.Linear(64, 96, bias=False)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 72, 3, stride=2)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(torch.relu(self.up(self.table(ids)))), self.wide(torch.relu(self.conv(image)))


INPUTS = (torch.arange(10).view(2, 5), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)))


class Watch(TorchDispatchMode):
    """Names fxquant's ops, and float tensors in the shape of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fxquant":
            self.ops.append(str(func))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype.itemsize > 1 and tuple(t.shape) in SHAPES:
                self.copies.append(f"{func} {tuple(t.shape)}")
        return out


def build() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def frozen(**config: Any) -> Net:
    model = build()
    fxquant.quantize(model, **config)
    fxquant.freeze(model)
    return model


def watched(run: Any) -> tuple[Any, Watch]:
    """The second call: the first one compiles and packs, since Dynamo guards on dispatch modes."""
    with torch.no_grad(), Watch() as watch:
        run(*INPUTS)
        watch.ops.clear()
        watch.copies.clear()
        return run(*INPUTS), watch


@pytest.mark.parametrize("preset", PRESETS)
def test_both_doors_call_the_same_ops(preset: str) -> None:
    config = {"config": preset, "embeddings": "int8"}
    model = frozen(**config)
    compiled = fxquant.compile(build(), executor="eager", preset=preset, embeddings="int8")
    want, by_graph = watched(compiled)
    got, by_module = watched(model)
    assert sorted(by_module.ops) == sorted(by_graph.ops)
    assert not by_module.copies
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("preset", ["int8wo", "int8dq", "int4wo", "int4dq", "fp8dq", "mxfp4"])
def test_a_frozen_model_through_the_backend_keeps_its_codes(preset: str) -> None:
    model = frozen(config=preset, embeddings="int8")
    want, by_module = watched(model)
    compiled = fxquant.compile(model, executor="eager")
    got, by_graph = watched(compiled)
    assert sorted(by_graph.ops) == sorted(by_module.ops)
    assert not by_graph.copies
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    report = compiled.report()
    assert sum(site.members for site in report.sites if site.is_quantized) == 5
    assert report.coverage == 1


@pytest.mark.parametrize("backend", ["fxquant", "aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["weight-only", "dynamic", "static", "static float8"])
def test_one_graph_in_every_mode(backend: str, mode: str) -> None:
    sides = {"weight-only": ("int4", None), "dynamic": ("int8", "int8/token"), "static": ("int8", "int8")}
    weights, activations = sides.get(mode, ("float8", "float8"))
    model = build()
    fxquant.quantize(model, weights=weights, activations=activations)
    if mode.startswith("static"):
        with torch.no_grad(), fxquant.Calibration():
            model(*INPUTS)
    fxquant.freeze(model)
    with torch.no_grad():
        want = model(*INPUTS)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(2):
            compiled(*INPUTS)
        got = compiled(*INPUTS)
    assert counter.frame_count == 1
    for a, b in zip(got, want, strict=True):
        # A float op in another order before a rounding may move a code.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-2 if activations else 1e-5)


def test_what_the_model_door_left_float_stays_so() -> None:
    model = build()
    fxquant.quantize(model, "int8wo", exclude="out")
    fxquant.freeze(model)
    compiled = fxquant.compile(model, executor="eager")
    with torch.no_grad():
        got, want = compiled(*INPUTS), model(*INPUTS)
    assert torch.equal(got[0], want[0])
    reasons = {path: site.reason for site in compiled.report().sites for path in site.paths}
    assert "left float by the model door" in reasons["out"]


def test_a_model_that_is_not_frozen_is_not_quantized_twice() -> None:
    model = build()
    fxquant.quantize(model, "int4wo")
    compiled = fxquant.compile(model, "int8dq", executor="eager")
    with torch.no_grad():
        got, want = compiled(*INPUTS), model(*INPUTS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Broken(nn.Module):
    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner

    @torch.compiler.disable
    def hidden(self, *inputs: Tensor) -> Any:
        return self.inner(*inputs)

    def forward(self, *inputs: Tensor) -> Any:
        return self.hidden(*inputs)  # pyright: ignore[reportArgumentType]  (typed for functions)


def test_what_dynamo_never_sees_is_quantized_too() -> None:
    model = Broken(frozen(config="int8dq"))
    compiled = fxquant.compile(model, executor="eager")
    got, watch = watched(compiled)
    want, _ = watched(copy.deepcopy(model))
    assert len(watch.ops) == 4
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert compiled.report().coverage is not None
