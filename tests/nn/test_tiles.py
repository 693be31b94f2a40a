"""Frozen weights in the layout of the Triton kernels: what a GPU would hold, computed here by the references."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.nn import devices
from fxquant.nn.base import QModule
from fxquant.pipeline import quantize_graph
from fxquant.runner import Deciding
from fxquant.spec import QuantConfig
from fxquant.target import Target
from tests.helpers import model_names, through_capture

INTEGERS = ("int8wo", "int8dq", "int4wo", "int4dq", "int2wo")
RECIPES = (*INTEGERS, "fp8dqrow", "fp8dq", "fp6_e3m2", "mxfp4wo", "nvfp4", "mxfp8")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the CPU count as a GPU of that architecture; '' makes it a CPU again."""

    def switch(arch: str) -> None:
        monkeypatch.setattr(devices, "arch_of", lambda device: arch)
        devices._multiplies_codes.cache_clear()

    yield switch
    devices._multiplies_codes.cache_clear()


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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def frozen_block(recipe: str) -> tuple[Block, Tensor]:
    """A block of a preset, or calibrated for a format of both sides: 'static int8'."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(5, 64)
    if recipe.startswith("static "):
        number = recipe.removeprefix("static ")
        fxquant.quantize(model, weights=number, activations=number)
        with fxquant.Calibration(), torch.no_grad():
            model(x)
    else:
        fxquant.quantize(model, preset=recipe)
    fxquant.freeze(model)
    return model, x


# recipe, architecture, what a report says of the linears, the kernel
COMPILED = [
    ("int8dq", "sm90", "w=int8/channel x=int8/token", "scaled_mm"),
    ("int4wo", "sm90", "w=int4/group128/affine/bf16", "coded_m"),
    ("fp8dqrow", "sm80", "w=float8_e4m3fn/channel x=float8_e4m3fn/token", "scaled_mm"),
    ("mxfp8", "sm100", "w=float8_e4m3fn/group32/e8m0 x=float8_e4m3fn/group32/e8m0", "mx_mm"),
    ("nvfp4", "sm90", "w=fp4_e2m1/group16/e4m3 x=fp4_e2m1/group16/e4m3", "coded_m"),
    ("static int8", "sm90", "w=int8/channel x=int8/tensor", "scaled_mm"),
    ("static float8_e4m3fn", "sm90", "w=float8_e4m3fn/channel x=float8_e4m3fn/tensor", "scaled_mm"),
]


@pytest.mark.parametrize(("recipe", "arch", "spec", "kernel"), COMPILED)
def test_a_compiled_graph_knows_the_kernels(
    recipe: str, arch: str, spec: str, kernel: str, on_gpu: Any, fresh_dynamo: None
) -> None:
    on_gpu(arch)
    model, x = frozen_block(recipe)
    with torch.no_grad():
        want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Dynamo warns of caches
        got, (captured,) = through_capture(model, x, fullgraph=True, names=model_names(model))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    config = QuantConfig("int8wo")
    lowered = quantize_graph(captured, config, Deciding(config), target=Target("cuda", arch=arch), evaluate=False)
    sites = lowered.report.sites
    assert [(site.paths, site.status, site.spec_text) for site in sites] == [
        (("up",), "lowered", spec),
        (("down",), "lowered", spec),
    ]
    for site, fused in zip(sites, ("+silu", "+residual"), strict=True):
        assert site.kernel.startswith(kernel)
        assert arch in site.kernel
        assert site.kernel.endswith(fused)
        assert site.reason == "frozen by the model door"
    if recipe == "int8dq":
        assert "norm_quantize" in lowered.gm.code


@pytest.mark.parametrize("recipe", ["int8dq", "mxfp8", "static int8"])
def test_fxquant_compile_counts_them(recipe: str, on_gpu: Any, fresh_dynamo: None) -> None:
    on_gpu("sm100")
    model, x = frozen_block(recipe)
    compiled = fxquant.compile(model, executor="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert "100.0% of the weights quantized" in str(compiled.report())


@pytest.mark.parametrize("recipe", ["int4wo", "int8dq", "nvfp4", "static float8_e4m3fn"])
def test_copies_and_pickles(recipe: str, on_gpu: Any) -> None:
    on_gpu("sm100")
    model, x = frozen_block(recipe)
    with torch.no_grad():
        want = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), want, rtol=0, atol=0)
    saved = pickle.dumps(model)
    on_gpu("")  # where it is read there is no such GPU
    with torch.no_grad():
        assert (pickle.loads(saved)(x) - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("recipe", ["int8dq", "int4dq", "fp8dqrow", "mxfp8", "static int8"])
def test_gradients_pass_through_as_on_a_cpu(recipe: str, on_gpu: Any) -> None:
    found: list[tuple[Tensor, ...]] = []
    for arch in ("", "sm100"):
        on_gpu(arch)
        model, x = frozen_block(recipe)
        x.requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        assert model.down.bias.grad is not None
        found.append((x.grad, model.down.bias.grad))
    for here, there in zip(*found, strict=True):
        assert (here - there).norm() <= 1e-2 * here.norm()  # codes of the inner activation may differ by one


def test_a_bias_has_a_gradient_where_x_has_none(on_gpu: Any) -> None:
    on_gpu("sm90")
    module, x = frozen("int8dq")
    module(x).sum().backward()
    assert module.bias is not None
    torch.testing.assert_close(module.bias.grad, torch.full((96,), 3.0))
