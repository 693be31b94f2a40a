"""quantize: what it changes, what it leaves, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import (
    AlreadyFrozen,
    InvalidOption,
    NonFiniteWeight,
    NotAModule,
    NotAQuantizedClass,
    PatternMatchesNothing,
    UncalibratedWarning,
)
from fxquant.nn import QLinear, QModule


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def quantized_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, QModule)}


LINEARS = {f"layers.{i}.{name}" for i in (0, 1) for name in ("attn", "mlp.0", "mlp.2")} | {"head"}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ({"exclude": "head"}, {"head"}),
        ({"exclude": ["layers.0"]}, {"layers.0.attn", "layers.0.mlp.0", "layers.0.mlp.2"}),
        ({"exclude": "*.mlp.*"}, {path for path in LINEARS if "mlp" in path}),
        ({"include": "layers.1"}, {path for path in LINEARS if "layers.1" not in path}),
        ({"include": "layers", "exclude": "*.attn"}, {"head", "layers.0.attn", "layers.1.attn"}),
        ({"rules": {"head": None}}, {"head"}),
    ],
)
def test_patterns_match_whole_subtrees(patterns: dict[str, object], left: set[str]) -> None:
    model = Model()
    report = fxquant.quantize(model, weights="int8", **patterns)  # pyright: ignore[reportArgumentType]
    assert quantized_paths(model) == LINEARS - left
    assert {row.paths[0] for row in report.skipped} == left | {"table"}


def test_a_pattern_that_matches_nothing_changes_nothing() -> None:
    model = Model()
    with pytest.raises(PatternMatchesNothing, match=r"'haed'.*Did you mean 'head'"):
        fxquant.quantize(model, weights="int8", exclude=["layers.0", "haed"])
    assert not quantized_paths(model)


@pytest.mark.parametrize(
    "given",
    [
        {"config": "int4wo"},
        {"weights": "int4", "group_size": 128},
        {"weights": "qint4"},
        {"config": fxquant.qint4},
        {"config": fxquant.QuantConfig(weights="int4")},
        {"config": {"weights": "int4"}},
        {"weights": fxquant.TensorSpec.parse("int4/group128/affine/bf16")},
    ],
)
def test_spellings_of_one_recipe(given: dict[str, object]) -> None:
    module = nn.Linear(256, 8)
    report = fxquant.quantize(module, **given)  # pyright: ignore[reportArgumentType]
    assert report.rows[0].spec == "w=int4/group128/affine/bf16"
    assert report.rows[0].bytes_after == fxquant.TensorSpec.parse("int4/group128/affine/bf16").nbytes((8, 256))


def test_the_algorithm_reaches_the_codes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    found = []
    for algorithm in (None, "hqq", "mse"):
        module = nn.Linear(256, 16)
        module.weight = nn.Parameter(weight.clone())
        fxquant.quantize(module, weights="int4", algorithm=algorithm)
        fxquant.freeze(module)
        found.append(module.weight)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert (found[2] - weight).square().mean() < (found[0] - weight).square().mean()


def test_the_report_tells_what_and_why() -> None:
    model = Model()
    report = fxquant.quantize(model, "int8dq", exclude="head")
    text = str(report)
    assert "6 of 8 modules quantized" in text
    assert "w=int8/channel x=int8/token" in text
    assert 'head (linear, 1600 weights): exclude "head"' in text
    assert "embeddings stay float by default" in text
    linears = 2 * (32 * 32 + 2 * 32 * 64)
    assert report.share == pytest.approx(linears / (linears + 2 * 1600))
    assert report.linear_share == pytest.approx(linears / (linears + 1600))
    assert report.bytes_after == linears + 2 * 4 * (32 + 64 + 32) + 2 * 4 * 1600


def test_the_root_itself_may_be_quantized() -> None:
    module = nn.Linear(8, 4)
    x = torch.randn(2, 8)
    fxquant.quantize(module, weights="int8")
    assert isinstance(module, QLinear)
    fxquant.freeze(module)
    assert module(x).shape == (2, 4)


def test_a_shared_module_is_quantized_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = fxquant.quantize(model, weights="int8")
    assert [row.paths for row in report.rows] == [("0", "2")]
    fxquant.freeze(model)
    assert model[0] is model[2]
    assert model(torch.randn(3, 8)).shape == (3, 8)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass with nothing of its own in its forward."""


def test_a_forward_of_its_own_is_left_and_named() -> None:
    model = nn.Sequential(Scaled(8, 8), Named(8, 8))
    report = fxquant.quantize(model, weights="int8")
    assert type(model[0]) is Scaled
    assert isinstance(model[1], QLinear)
    assert isinstance(model[1], Named)
    (row,) = report.skipped
    assert row.reason == "Scaled has a forward of its own, which is left as it is"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_tied_weights_are_one_also_through_a_file() -> None:
    model, other = Tied(), Tied()
    for one in (model, other):
        fxquant.quantize(one, weights="int4")
    fxquant.freeze(model)
    assert {name.split(".")[0] for name in model.state_dict()} == {"head"}
    other.load_state_dict(model.state_dict(), strict=True)
    ids = torch.arange(50)
    with torch.no_grad():
        assert torch.equal(other(ids), model(ids))
    assert fxquant.memory_footprint(other) == fxquant.memory_footprint(model) == 50 * (16 + 3)


def test_a_subclass_survives_a_pickle() -> None:
    import pickle

    module = Named(8, 4)
    fxquant.quantize(module, weights="int8")
    fxquant.freeze(module)
    x = torch.randn(2, 8)
    twin = pickle.loads(pickle.dumps(module))
    assert isinstance(twin, Named)
    assert torch.equal(twin(x), module(x))


def emptied(module: nn.Linear) -> nn.Linear:
    module.weight = nn.Parameter(torch.empty(4, 0))
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(8, 4).double(), "float64"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), "parametrized"),
        (emptied(nn.Linear(1, 4)), "empty"),
        (nn.Bilinear(4, 4, 4), "no quantized class"),
        (nn.LazyLinear(4), "lazy"),
    ],
)
def test_what_cannot_be_quantized_says_why(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(module)
    report = fxquant.quantize(model, weights="int8")
    assert not report.quantized
    assert any(reason in row.reason for row in report.skipped)
    assert type(model[0]) is type(module)


def test_twice_is_the_last_one() -> None:
    module = nn.Linear(256, 16)
    fxquant.quantize(module, weights="int8")
    fxquant.quantize(module, weights="int4")
    fxquant.freeze(module)
    assert str(module.quantized_weight().spec) == "int4/group128/affine/bf16"  # pyright: ignore[reportCallIssue]


def test_after_freeze_the_same_is_fine_and_another_is_refused() -> None:
    model = Model()
    fxquant.quantize(model, weights="int8", exclude="head")
    fxquant.freeze(model)
    before = model.state_dict()
    with pytest.raises(AlreadyFrozen, match=r"'layers.0.attn'.*quantize the float model anew"):
        fxquant.quantize(model, weights="int4")
    assert type(model.head) is nn.Linear  # nothing has been changed
    fxquant.quantize(model, weights="int8")
    assert isinstance(model.head, QLinear)
    assert not model.head.is_frozen
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_refusal_names_those_that_would_change() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    fxquant.quantize(model, weights="int8", rules={"1": "int4wo"})
    fxquant.freeze(model)
    with pytest.raises(AlreadyFrozen) as refused:
        fxquant.quantize(model, weights="int8")
    assert refused.value.paths == ("1",)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_is_scripted_stays_as_it_is() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
    report = fxquant.quantize(model, weights="int8")
    assert [row.path for row in report.quantized] == ["1"]
    fxquant.freeze(model)
    assert model(torch.randn(2, 8)).shape == (2, 8)


def calibrated(**options: str) -> tuple[nn.Sequential, Tensor]:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(16, 8)
    fxquant.quantize(model, **options)  # pyright: ignore[reportArgumentType]
    with fxquant.Calibration():
        model(x)
    return model, x


def test_ranges_of_another_recipe_are_dropped() -> None:
    for first, then in (("float8", "int8"), ("int8", "int8/token"), ("int8", None)):
        model, x = calibrated(weights="int8", activations=first)
        fresh = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        fresh.load_state_dict(model.state_dict(), strict=False)
        for one in (model, fresh):
            fxquant.quantize(one, weights="int8", activations=then)
        assert torch.equal(model(x), fresh(x))
        assert "0.input_scale" not in model.state_dict()


def test_the_same_recipe_keeps_what_was_calibrated() -> None:
    model, x = calibrated(weights="int8", activations="int8/tensor")
    before = model(x)
    fxquant.quantize(model, weights="int8", activations="int8/tensor")
    assert torch.equal(model(x), before)  # and does not warn: warnings are errors here


def test_loaded_ranges_end_the_waiting() -> None:
    model, x = calibrated(weights="int8", activations="int8/tensor")
    other = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    fxquant.quantize(other, weights="int8", activations="int8/tensor")
    other.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(other[:2](x), model(x))
    with pytest.warns(UncalibratedWarning, match="activations of '2' are"):
        other(x)


def test_activations_need_weights() -> None:
    with pytest.raises(InvalidOption, match="give weights too"):
        fxquant.quantize(nn.Linear(8, 4), activations="int8")


def test_no_model() -> None:
    with pytest.raises(NotAModule, match="a function"):
        fxquant.quantize(lambda x: x, weights="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotAModule):
        fxquant.freeze(torch.relu)  # pyright: ignore[reportArgumentType]


def test_a_weight_that_is_not_finite_freezes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fxquant.quantize(model, weights="int8")
    with torch.no_grad():
        model.get_parameter("1.weight")[2, 3] = float("nan")
    with pytest.raises(NonFiniteWeight, match=r"'1' holds 1 non-finite value, the first at \[2, 3\]"):
        fxquant.freeze(model)
    assert not model[0].is_frozen


def test_a_device_gets_frozen_modules_one_by_one() -> None:
    model = Model()
    fxquant.quantize(model, weights="int8", device="cpu")
    modules = [module for module in model.modules() if isinstance(module, QModule)]
    assert modules
    assert all(module.is_frozen for module in modules)


@pytest.mark.parametrize(
    ("activations", "calibratable", "warns"),
    [("int8", True, False), ("int8/token", False, False), ("int8/tensor", True, True), ("float8", True, False)],
)
def test_who_waits_for_a_calibration(activations: str, calibratable: bool, warns: bool) -> None:
    module = nn.Linear(8, 4)
    fxquant.quantize(module, weights="int8", activations=activations)
    assert module.calibratable is calibratable
    assert bool(module._uncalibrated) is warns


def test_a_static_model_without_ranges_warns_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fxquant.quantize(model, weights="int8", activations="int8/tensor")
    with pytest.warns(UncalibratedWarning, match="'0', '1'"):
        model(torch.randn(2, 8))
    model(torch.randn(2, 8))  # warnings are errors here


def test_a_class_of_the_users() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (0.5 * self.weight).t()

    @fxquant.register_module(Halved)
    class QHalved(fxquant.QModule, Halved):
        def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
            return matrix

        def float_product(self, x: Tensor, weight: Tensor) -> Tensor:
            return x @ (0.5 * weight).t()

        def has_kernels(self, name: str = "weight") -> bool:
            return False

    model = nn.Sequential(Halved())
    x = torch.randn(3, 8)
    want = model(x)
    report = fxquant.quantize(model, weights="int8")
    assert report.share == 1
    fxquant.freeze(model)
    assert isinstance(model[0], QHalved)
    torch.testing.assert_close(model(x), want, rtol=0.05, atol=0.05)
    assert fxquant.memory_footprint(model) == 6 * 8 + 6 * 4


def test_a_class_that_cannot_stand_in_is_refused() -> None:
    with pytest.raises(NotAQuantizedClass, match=r"class QBilinear\(fxquant.QModule, Bilinear\)"):
        fxquant.register_module(nn.Bilinear)(QLinear)
