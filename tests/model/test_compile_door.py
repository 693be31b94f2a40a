"""Quantized modules through the compile door: their sites in reports, what stays float, what runs outside any graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxquant
from fxquant.report import ModelReport
from fxquant.weights import process_store
from tests.helpers import capture
from tests.test_fallback import Broken, Disabled, Host

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FROZEN = "frozen by the model door"
LEFT = "left float by the model door"
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 64)).eval()


def frozen(model: nn.Module, *args: Any, **config: Any) -> Any:
    fxquant.quantize(model, *args, **config)
    fxquant.freeze(model)
    return model


def view_of(model: nn.Module, *args: Any, **fields: Any) -> fxquant.CompiledModel:
    return fxquant.compile(model, *args, executor="eager", **fields)


def bare(model: nn.Module, **options: Any) -> tuple[Any, list[ModelReport]]:
    """The compiled model, and a list that has a report of its graphs once it has been called."""
    reports: list[ModelReport] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        made = fxquant.QuantizingBackend(fxquant.QuantConfig(executor="eager", **options))
        run = made(gm, inputs)
        reports.append(ModelReport.of_graphs(made.reports))
        return run

    return torch.compile(model, backend=backend), reports


def rows(report: ModelReport) -> dict[str, tuple[str, str, str, str]]:
    return {s.path: (s.status, s.kernel, s.spec_text, s.reason) for s in report.sites}


@torch.no_grad()
def test_kernels_of_frozen_modules_are_rows_of_the_report() -> None:
    model = sequence()
    fxquant.quantize(model, include="0")
    fxquant.quantize(model, weights="int4/group32", activations="int8", include="2", algorithm="mse")
    fxquant.freeze(model)
    want = {
        "0": ("lowered", "int8_linear_dynamic +relu", "w=int8/channel x=int8/token", FROZEN),
        "2": ("lowered", "linear_dynamic", "w=int4/group32 x=int8/token", FROZEN),
        "3": ("skipped", "", "", LEFT),
    }
    view, (compiled, reports) = view_of(model, fullgraph=True), bare(model)
    assert torch.equal(view(X), model(X))
    assert torch.equal(compiled(X), model(X))
    assert rows(view.report()) == rows(reports[0]) == want
    assert [site.algorithm for site in view.report().sites] == [""] * 3  # codes do not tell
    floats = [4 * size for size in (64 * 96, 96 * 64, 64 * 64)]
    assert view.report().coverage == pytest.approx(sum(floats[:2]) / sum(floats))
    assert [row.name for row in view.report().uncovered] == ["3.weight"]


@torch.no_grad()
def test_activations_in_groups_are_quantized_in_the_kernel() -> None:
    model = frozen(sequence(), weights="int8", activations="int8/group32")
    view, (compiled, reports) = view_of(model, fullgraph=True), bare(model)
    assert torch.equal(view(X), model(X))
    assert torch.equal(compiled(X), model(X))
    found = rows(reports[0])
    assert found["0"] == ("lowered", "linear_dynamic +relu", "w=int8/channel x=int8/group32", FROZEN)
    assert found["2"][1:3] == ("linear_dynamic", "w=int8/channel x=int8/group32")
    unfrozen = sequence()
    config = fxquant.QuantConfig(weights="int8", activations="int8/group32", executor="eager")
    torch.testing.assert_close(fxquant.compile(unfrozen, config)(X), model(X), rtol=0, atol=1e-5)


@torch.no_grad()
def test_activations_that_were_rounded_before_the_kernel_are_in_the_spec() -> None:
    model = frozen(sequence(), weights="int4/group32", activations="float8_e4m3fn")
    with fxquant.Calibration():
        model[2](torch.randn(3, 96))
    view = view_of(model)
    view(X)
    specs = {site.path: site.spec_text for site in view.report().sites}
    assert specs["0"] == "w=int4/group32 x=float8_e4m3fn/token"
    assert specs["2"] == "w=int4/group32 x=float8_e4m3fn/tensor"


@pytest.mark.parametrize("door", ["bare", "model in hand"])
@torch.no_grad()
def test_a_recipe_of_this_door_takes_what_the_other_left(door: str) -> None:
    model = frozen(sequence(), "int8dq", exclude="3")
    if door == "bare":
        compiled, reports = bare(model, preset="int8wo")
        compiled(X)
        found = rows(reports[0])
    else:
        view = view_of(model, "int8wo")
        view(X)
        found = rows(view.report())
    assert found["3"][:3] == ("lowered", "int8_linear_weight_only", "w=int8/channel")
    assert found["0"][3] == FROZEN


@torch.no_grad()
def test_without_the_model_a_graph_of_its_own_is_like_any_other() -> None:
    """The bare door sees no module: what a graph break parts from the frozen ones gets the default."""
    model = frozen(Host(Broken()).eval(), "int8dq", exclude=["last", "block.b"])
    compiled, reports = bare(model)
    compiled(X)
    status = {path: row[0] for report in reports for path, row in rows(report).items()}
    assert status["first"] == "lowered"
    view = view_of(model)
    assert torch.equal(view(X), model(X))
    assert {rows(view.report())[path][3] for path in ("last", "block.b")} == {LEFT}


@torch.no_grad()
def test_a_module_that_is_not_frozen_is_not_quantized_again() -> None:
    model = sequence()
    fxquant.quantize(model, "int4wo", exclude="3")
    packed = process_store().packed_count
    view = view_of(model, "int8dq")
    view(X)
    found = rows(view.report())
    assert found["0"] == ("declined", "", "", "quantized by the model door; freeze it")
    assert found["3"][0] == "lowered"
    assert process_store().packed_count == packed + 1
    with_recipe = view_of(model, "int8dq", exclude="3")(X)
    fxquant.freeze(model)
    # The same weights, summed up in another order: 96 products of float32, each below 1.
    torch.testing.assert_close(view_of(model, "int8dq", exclude="3")(X), with_recipe, rtol=0, atol=96 * 2**-23)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_rows_that_a_table_rounds_are_not_rounded_twice(dynamic: bool) -> None:
    model, ids = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 4)).eval(), torch.arange(6).view(2, 3)
    fxquant.quantize(model, "int8wo", embeddings="int4/group16")
    view = view_of(model, "int8wo", embeddings="int8", dynamic=dynamic)
    assert torch.equal(view(ids), model(ids))
    assert {row[3] for row in rows(view.report()).values()} == {"quantized by the model door; freeze it"}


@torch.no_grad()
def test_a_weight_that_is_decoded_at_each_call_is_not_quantized_again() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval(), torch.randn(2, 4, 7, 7)
    frozen(model, "int4wo", group_size=18)
    view = view_of(model, "int8dq")
    assert torch.equal(view(images), model(images))
    assert rows(view.report()) == {"0": ("lowered", "decode_rows", "", FROZEN)}
    assert view.report().coverage == 1.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@torch.no_grad()
def test_each_reader_of_a_tied_weight_has_its_own_path() -> None:
    model = frozen(Tied().eval(), "int8wo", embeddings="int8")
    view, ids = view_of(model), torch.arange(7)[None]
    assert torch.equal(view(ids), model(ids))
    assert {path: row[0] for path, row in rows(view.report()).items()} == {"embed": "lowered", "head": "lowered"}
    assert view.report().coverage == 1.0


class Stack(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@torch.no_grad()
def test_equal_blocks_with_a_break_are_one_graph_each_and_all_reported() -> None:
    model = frozen(Stack(Broken).eval(), "int8dq")
    view = view_of(model)
    counters.clear()
    for _ in range(3):
        assert torch.equal(view(X), model(X))
    made = counters["stats"]["unique_graphs"]
    view(X)
    assert counters["stats"]["unique_graphs"] == made
    assert view.report().coverage == 1.0
    assert not view.report().fallbacks


@pytest.mark.parametrize("freeze", [True, False])
@torch.no_grad()
def test_what_runs_in_eager_has_a_row_and_no_twin(freeze: bool) -> None:
    model = Stack(Disabled).eval()
    fxquant.quantize(model, "int8dq", exclude="blocks.1")
    if freeze:
        fxquant.freeze(model)
    view = view_of(model)
    first = view(X)
    assert torch.equal(first, model(X))
    assert torch.equal(view(X), first)
    by_path = {row.path: row for row in view.report().fallbacks}
    state = FROZEN if freeze else "quantized by the model door"
    row = by_path["blocks.0.proj"]
    assert (row.status, row.spec_text) == ("fallback", "w=int8/channel x=int8/token")
    assert row.reason == f"never seen by Dynamo: {state}, runs so in eager"
    assert (row.bytes_after < row.bytes_before) is freeze
    assert by_path["blocks.1.proj"].status == "skipped"
    assert LEFT in by_path["blocks.1.proj"].reason
    assert view.report().coverage == pytest.approx(2 / 3)


@torch.no_grad()
def test_quantizing_after_compiling_is_seen() -> None:
    model = Host(Disabled()).eval()
    view = view_of(model)
    view(X)
    frozen(model, "int4wo")
    assert torch.equal(view(X), model(X))
    assert {row.spec_text for row in view.report().fallbacks} == {"w=int4/group128/affine/bf16"}


@torch.no_grad()
def test_quantizing_the_root_after_compiling_is_seen() -> None:
    model = nn.Linear(64, 8).eval()
    view = view_of(model, fullgraph=True)
    view(X)
    frozen(model, "int4wo")
    assert torch.equal(view(X), model(X))
    assert view.report().coverage == 1.0


@pytest.mark.parametrize("kind", ["weight-only", "dynamic"])
@torch.no_grad()
def test_no_recompile_per_call(kind: str) -> None:
    model = frozen(sequence(), "int4wo" if kind == "weight-only" else "int8dq")
    for compiled in (view_of(model), bare(model)[0]):
        torch._dynamo.reset()
        counters.clear()
        for _ in range(4):
            compiled(X)
        assert counters["stats"]["unique_graphs"] == 1


def test_capture_spells_the_ops_out_and_names_their_modules() -> None:
    captured = capture(frozen(sequence(), "int8dq"), X)
    kernels = captured.gm.graph.find_nodes(op="call_function", target=torch.ops.fxquant.int8_linear_dynamic.default)
    assert [node.meta["fxquant"].paths for node in kernels] == [("0",), ("2",), ("3",)]


class Asking(nn.Module):
    """Asks for a weight's dtype at two places, as T5 does, and reads its values at two if told to."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 64] -> [B, 64]"""
        y = self.fc(x.to(self.fc.weight.dtype)).to(self.fc.weight.dtype)
        return y + x @ self.fc.weight + self.fc.weight.sum(0) if self.reads else y


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("preset", ["int8wo", "int8dq", "int4wo"])
def test_a_frozen_weight_may_be_asked_for_more_than_once(preset: str, reads: bool) -> None:
    torch.manual_seed(0)
    model = frozen(Asking(reads=reads).eval(), preset)
    with torch.no_grad():
        view = view_of(model, fullgraph=True)
        torch.testing.assert_close(view(X), model(X), rtol=0, atol=1e-5)
        assert ("fc",) in {site.paths for site in view.report().sites if site.status == "lowered"}
