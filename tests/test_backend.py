"""The bare door, ``torch.compile(backend="fxquant")``: whole graphs, no more of them than Inductor, options by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fxquant
from fxquant.backend import _device_of
from fxquant.weights import process_store
from tests.models import Decoder, DecoderLayer, VisionEncoder, sqnr

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # at the import of torch._inductor
]

Model = tuple[nn.Module, tuple[Tensor, ...]]
EAGER: dict[str, Any] = {"executor": "eager"}


def decoder() -> Model:
    torch.manual_seed(0)
    return Decoder(width=64).eval(), (torch.randint(0, 128, (2, 9)),)


def vision() -> Model:
    torch.manual_seed(0)
    return VisionEncoder().eval(), (torch.randn(2, 3, 32, 32),)


def sentence_encoder() -> Model:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    ids = torch.randint(0, 128, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return _Pooled(transformers.BertModel(config).eval()), (ids, mask)


class _Pooled(nn.Module):
    """Mean over the tokens that the mask keeps, as sentence encoders do."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


# SQNR in dB of int8dq on these seeds, measured: 42.0, 36.7, 68.6 (a random BERT hardly changes its embeddings). Two dB
# less is another quantization; ten more is none.
MODELS: dict[str, tuple[Callable[[], Model], float]] = {
    "decoder": (decoder, 40.0),
    "vision": (vision, 34.7),
    "sentence encoder": (sentence_encoder, 66.6),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_whole_model_is_one_graph(name: str) -> None:
    make, least = MODELS[name]
    model, inputs = make()
    want = model(*inputs)
    counters.clear()
    compiled = torch.compile(model, backend="fxquant", fullgraph=True, options=EAGER)
    got = compiled(*inputs)
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    assert least < sqnr(got, want) < least + 12.0
    assert torch.equal(compiled(*inputs), got)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_whole_model_is_one_graph_under_inductor(name: str) -> None:
    make, least = MODELS[name]
    model, inputs = make()
    got = torch.compile(model, backend="fxquant", fullgraph=True)(*inputs)
    assert least < sqnr(got, model(*inputs)) < least + 12.0


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
@torch.no_grad()
def test_inductor_runs_the_same_numbers(wrapper: str) -> None:
    """The kernels are the same ops; what Inductor fuses around them is float32, here a relu: exact."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval(), torch.randn(3, 64)
    got = torch.compile(model, backend="fxquant", fullgraph=True, options={"wrapper": wrapper})(x)
    torch._dynamo.reset()
    assert torch.equal(got, torch.compile(model, backend="fxquant", options=EAGER)(x))


# ---- graphs and recompiles

SHAPES = [(2, 16), (3, 7), (1, 33), (2, 16), (1, 1), (4, 5)]


def graphs_made(backend: Any, model: nn.Module, dynamic: bool | None, shapes: Sequence[tuple[int, int]]) -> int:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for shape in shapes:
            compiled(torch.zeros(shape, dtype=torch.int64))
    return counter.frame_count


def in_eager(gm: Any, inputs: Any) -> Any:
    return fxquant.backend(gm, inputs, options=EAGER)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_no_more_graphs_than_dynamo_must_make(dynamic: bool | None) -> None:
    model = Decoder(layers=1).eval()
    assert graphs_made(in_eager, model, dynamic, SHAPES) == graphs_made("eager", model, dynamic, SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_no_more_graphs_than_with_inductor(dynamic: bool | None) -> None:
    model = Decoder(layers=1, width=32, hidden=64, vocabulary=32).eval()
    shapes = SHAPES[:3] if dynamic is False else SHAPES
    assert graphs_made("fxquant", model, dynamic, shapes) <= graphs_made("inductor", model, dynamic, shapes)


@pytest.mark.slow
@torch.no_grad()
def test_one_dynamic_graph_gives_what_static_ones_give() -> None:
    torch.manual_seed(0)
    model = Decoder(layers=1, width=32, hidden=64).eval()
    compiled = torch.compile(model, backend="fxquant", dynamic=True, fullgraph=True)
    for shape in SHAPES[:3]:
        ids = torch.randint(0, 128, shape)
        assert 38.0 < sqnr(compiled(ids), model(ids)) < 60.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, inputs = decoder()
    model = model.to(dtype)
    got = torch.compile(model, backend=in_eager, fullgraph=True)(*inputs)
    assert got.dtype is dtype
    assert 36.0 < sqnr(got, model(*inputs)) < 60.0


@torch.no_grad()
def test_autocast_gives_the_dtype_that_float_gives() -> None:
    model, x = nn.Linear(64, 32).eval(), torch.randn(3, 64)
    compiled = torch.compile(model, backend=in_eager, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), model(x)
    assert got.dtype is want.dtype is torch.bfloat16
    assert 30.0 < sqnr(got, want) < 60.0


# ---- equal blocks, each compiled


@torch.no_grad()
def test_twelve_equal_blocks_are_one_lowering_and_each_weight_packs_once() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(DecoderLayer(64, 4, 2, 160) for _ in range(12)).eval()
    whole, x = nn.Sequential(*layers), torch.randn(2, 8, 64)
    want = torch.compile(whole, backend=in_eager, fullgraph=True)(x)
    torch._dynamo.reset()
    lowered: list[torch.fx.GraphModule] = []

    def counting(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        lowered.append(gm)
        return in_eager(gm, inputs)

    for layer in layers:
        layer.compile(backend=counting)
    fxquant.refresh(layers)
    store = process_store()
    count = store.packed_count
    for _ in range(3):
        y = x
        for layer in layers:
            y = layer(y)
        assert torch.equal(y, want)
        assert store.packed_count - count == 12 * 4  # q k v joined, o, gate up joined, down
    assert len(lowered) == 1


# ---- options


def compile_with(options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(nn.Linear(8, 8), backend="fxquant", options=options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"presett": "int8dq"}, "UnknownOption.*unknown option 'presett'. Did you mean 'preset'.*Known: preset, rules"),
        ({"preset": "int8dp"}, "UnknownPreset.*unknown preset 'int8dp'. Did you mean.*Known: .*int8wo"),
        ({"executor": "inducktor"}, "InvalidOption.*'inductor', 'eager'; did you mean 'inductor'"),
        ({"mode": "fast"}, "InvalidOption.*option 'mode'.*'reduce-overhead'"),
        ({"fuse": 1}, "InvalidOption.*option 'fuse'.*True or False"),
        ({"weights": "int9"}, "UnknownFormat.*unknown number format 'int9'"),
        ({"training": True, "strict": True}, "InvalidOption.*training runs on none"),
    ],
)
@torch.no_grad()
def test_a_wrong_option_is_a_named_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=f"(?s){words}"):
        compile_with(options)(torch.randn(2, 8))


@torch.no_grad()
def test_mode_travels_in_the_options() -> None:
    """torch refuses mode= beside options=."""
    x = torch.randn(2, 8)
    model = nn.Linear(8, 8)
    options: Any = {"mode": "max-autotune-no-cudagraphs", **EAGER}
    assert torch.compile(model, backend="fxquant", options=options)(x).shape == (2, 8)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="option 'mode' has the value 'fast'"):
        torch.compile(model, backend="fxquant", mode="fast")(x)


@torch.no_grad()
def test_inductor_gets_the_mode_and_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def compile_fx(gm: torch.fx.GraphModule, inputs: Any, config_patches: Any = None) -> Any:
        given.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    compile_with({"mode": "max-autotune-no-cudagraphs"})(torch.randn(2, 8))
    assert given[0]["max_autotune"] is True
    torch._dynamo.reset()
    compile_with({"wrapper": "cpp"})(torch.randn(2, 8))
    assert given[1]["cpp_wrapper"] is True
    torch._dynamo.reset()
    compile_with({})(torch.randn(2, 8))
    assert not given[2]


@torch.no_grad()
def test_changed_weights_are_seen_without_guards_on_modules() -> None:
    """A user may have Dynamo leave out its guards on modules: the weights are watched by us."""
    torch.manual_seed(0)
    model, x = nn.Linear(64, 32, bias=False), torch.randn(2, 64)
    options: Any = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, **EAGER}
    compiled = torch.compile(model, backend="fxquant", fullgraph=True, options=options)
    before = compiled(x)
    model.weight.mul_(2)
    assert torch.equal(compiled(x), 2 * before)


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


@torch.no_grad()
def test_rules_by_path_need_the_model_where_a_graph_breaks() -> None:
    x = torch.randn(2, 8)
    by_path: Any = {"rules": {"b": None}, **EAGER}
    compiled = torch.compile(Breaking(), backend="fxquant", options=by_path)
    with pytest.raises(BackendCompilerFailed, match=r"(?s)PathRulesNeedModel.*'b'.*fxquant.compile"):
        compiled(x)
    torch._dynamo.reset()
    whole = nn.Sequential(nn.Linear(8, 8))  # without a break Dynamo's own names do
    compiled = torch.compile(whole, backend="fxquant", options={"exclude": "0", **EAGER})
    assert torch.equal(compiled(x), whole(x))


# ---- the machine


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_without_a_compiler_there_is_one_warning_and_the_right_answer(tmp_path: Path) -> None:
    code = """
import warnings, torch, fxquant
from torch import nn
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(4, 64)
    y = torch.compile(model, backend="fxquant")(x)
    fxquant.compile(model)(x)
    (warning,) = caught
    assert issubclass(warning.category, fxquant.errors.KernelsUnavailableWarning), warning
    assert "CXX=/nonexistent names no compiler" in str(warning.message), warning
    noise = (y - model(x)).square().sum() / model(x).square().sum()
    assert 1e-7 < noise < 10 ** -3.5, noise
"""
    done = run_python(code, CXX="/nonexistent", FXQUANT_CACHE_DIR=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr


def test_the_bare_door_says_that_it_sees_graphs_only(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 8).eval().requires_grad_(False), torch.randn(2, 8)
    torch.compile(model, backend="fxquant", options={"executor": "eager", "dump": str(tmp_path / "bare")})(x)
    fxquant.compile(model, executor="eager", dump=tmp_path / "known")(x)
    bare, known = ((tmp_path / door / "graph_000" / "00-summary.txt").read_text() for door in ("bare", "known"))
    assert "sees graphs only" in bare
    assert "fxquant.compile" in bare
    assert "sees graphs only" not in known


def test_a_graph_is_for_the_device_of_most_of_its_weights() -> None:
    def device_of(*weights: Tensor) -> str:
        graph = torch.fx.Graph()
        for weight in weights:
            graph.get_attr("weight").meta["val"] = weight
        return _device_of(SimpleNamespace(gm=SimpleNamespace(graph=graph)))  # pyright: ignore[reportArgumentType]

    counter, matrix = torch.zeros(()), torch.empty(4, 4, device="meta")
    assert device_of(counter, matrix, counter) == "meta"
    assert device_of(counter) == device_of() == "cpu"
