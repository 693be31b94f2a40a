"""Checkpoints of optimum-quanto 0.2.7, read and written: the same weights on both sides."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidQuantizationMap, NotForQuanto, StateDictMismatch
from fxquant.model.quanto import FORMATS, group_size, to_quanto
from fxquant.spec import number_format
from tests.model.quanto_models import CASES, Case, build, samples

PEER = str(Path(__file__).parent / "quanto_peer.py")


# Rows of 256 weights, as Quanto groups them: symmetric, with zero points, with float ones.
OWN = ("int8/channel", "float8_e4m3fn/tensor", "int4/group128", "int4/group128/affine/bf16", "int2/channel/shift")


def own(spec: str) -> Any:
    """A model that fxquant quantized."""
    model = build(CASES["qint4"])
    fxquant.quantize(model, weights=spec, include=["one", "sixteen", "linears.3"])
    fxquant.freeze(model)
    return model


def written(case: str, model: nn.Module) -> dict[str, Any]:
    state, quantization_map = to_quanto(model)
    return {"case": case, "state": state, "map": quantization_map}


def run_peer(*arguments: str) -> None:
    done = subprocess.run([sys.executable, PEER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("quanto") / "made.pt"
    run_peer("make", str(out))
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def returned(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Quanto has of the models that fxquant read from it and wrote again, and of those that fxquant quantized."""
    folder = tmp_path_factory.mktemp("quanto")
    given = {}
    for name in made:
        if CASES[name].frozen:
            given[name] = written(name, loaded(name, made))
    given |= {spec: written("qint4", own(spec)) for spec in OWN}
    torch.save(given, folder / "in.pt")
    run_peer("read", str(folder / "in.pt"), str(folder / "out.pt"))
    return {"given": given, "got": torch.load(folder / "out.pt", weights_only=True)}


def loaded(name: str, made: dict[str, Any], *, meta: bool = False) -> Any:
    """Quanto's checkpoint of that case in a fresh model, whose own weights are wrong or absent."""
    model = build(CASES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    if meta:
        model.to("meta")
    fxquant.requantize(model, made[name]["state"], made[name]["map"])
    return model


def bound(case: Case, theirs: Tensor, model: Any, path: str) -> Tensor:
    """How far weights may differ: not at all, but for Quanto's second rounding in half precision.

    Quanto rounds scale * code = w + shift, and then w; we round w once, in units u of the dtype.
    """
    quantized = model.get_submodule(path).quantized_weight()
    if case.dtype is torch.float32 or quantized.zero_point is None:
        return torch.zeros(())
    unit = torch.finfo(case.dtype).eps / 2
    return 1.01 * unit * (3 * theirs.double().abs() + quantized.zero_point.double().abs().max())


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].frozen])
def test_a_checkpoint_of_quantos_has_the_same_weights_here(name: str, made: dict[str, Any]) -> None:
    model, case = loaded(name, made), CASES[name]
    assert len(made[name]["weights"]) >= 8
    for path, theirs in made[name]["weights"].items():
        module = model.get_submodule(path)
        assert isinstance(module, fxquant.QModule)
        assert module.is_frozen
        ours = module.weight
        assert ours.dtype is case.dtype
        assert ours.shape == theirs.shape
        assert torch.all((ours.double() - theirs.double()).abs() <= bound(case, theirs, model, path))
    original = build(case)
    assert torch.equal(model.linears[1].bias, made[name]["state"]["linears.1.bias"])
    if case.weights != "qint2":
        x = samples(case)
        with torch.no_grad():
            far = (model(x) - original(x)).float().norm() / original(x).float().norm()
        assert far < 0.25


@pytest.mark.parametrize("name", ["qint8", "qint4", "qint8 with qint8"])
def test_also_onto_the_meta_device(name: str, made: dict[str, Any]) -> None:
    x = samples(CASES[name])
    with torch.no_grad():
        assert torch.equal(loaded(name, made, meta=True)(x), loaded(name, made)(x))


def test_the_groups_are_those_that_quanto_takes(made: dict[str, Any]) -> None:
    model = loaded("qint4", made)
    found = {path: model.get_submodule(path)._weight_spec for path in made["qint4"]["map"]}
    assert found == {
        "conv": "int4/group96/shift",
        "plain": "int4/channel/shift",
        "linears.0": "int4/channel/shift",
        "linears.1": "int4/group32/shift",
        "linears.2": "int4/group96/shift",
        "linears.3": "int4/group128/shift",
        "linears.4": "int4/group64/shift",
        "linears.5": "int4/channel/shift",
        "one": "int4/group128/shift",
        "sixteen": "int4/group128/shift",
    }
    widths = [64, 160, 192, 256, 288, 320, 352, 1000, 1056, 11008]
    assert [group_size(w) for w in widths] == [None, 32, 96, 128, 96, 64, 32, None, 96, 128]


def test_calibrated_scales_come_along(made: dict[str, Any]) -> None:
    case, model = made["qint8 with qint8"], loaded("qint8 with qint8", made)
    linear: Any = model.get_submodule("linears.3")
    assert torch.equal(linear.input_scale, case["state"]["linears.3.input_scale"])
    assert torch.equal(linear.output_scale, case["state"]["linears.3.output_scale"])
    assert linear._activation_spec == "int8/token"
    assert linear.calibratable
    assert "static" in repr(linear)
    assert not isinstance(model.get_submodule("norm"), fxquant.QModule)
    weight_only: Any = loaded("qint8", made).get_submodule("linears.3")
    assert weight_only.input_scale is None


def test_a_scale_of_one_is_quantos_word_for_none(made: dict[str, Any]) -> None:
    case = copy.deepcopy(made["qint8 with qint8"])
    case["state"]["one.input_scale"] = torch.ones(())
    model = build(CASES["qint8"])
    fxquant.requantize(model, case["state"], case["map"])
    assert model.one.input_scale is None
    assert model.sixteen.input_scale is not None


def test_a_model_that_is_not_frozen_stays_float_and_rounds(made: dict[str, Any]) -> None:
    case, model = made["qint4 not frozen"], loaded("qint4 not frozen", made)
    linear: Any = model.get_submodule("linears.1")
    assert not linear.is_frozen
    assert torch.equal(linear.weight, case["state"]["linears.1.weight"])
    assert linear._weight_spec == "int4/group32/shift"


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].frozen])
def test_what_we_write_is_what_quanto_reads(name: str, made: dict[str, Any], returned: dict[str, Any]) -> None:
    got = returned["got"][name]
    assert "" not in got or torch.isfinite(got[""]).all()
    for path, theirs in made[name]["weights"].items():
        assert torch.equal(got[path], theirs)
    given, original = returned["given"][name], made[name]
    assert {k: v for k, v in original["map"].items() if k != "norm"} == given["map"]
    for key, tensor in given["state"].items():
        assert tensor.dtype == original["state"][key].dtype, key
        assert tensor.shape == original["state"][key].shape, key


@pytest.mark.parametrize("spec", OWN)
def test_what_we_quantize_ourselves_quanto_reads(spec: str, returned: dict[str, Any]) -> None:
    model, got = own(spec), returned["got"][spec]
    assert set(returned["given"][spec]["map"]) == {"one", "sixteen", "linears.3"}
    for path in returned["given"][spec]["map"]:
        module: Any = model.get_submodule(path)
        assert torch.equal(got[path], module.weight)
    x = samples(CASES["qint4"])
    with torch.no_grad():
        torch.testing.assert_close(model(x), got[""], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"weights": "int6"}, "its weights are int6; Quanto has int2, int4, int8"),
        (
            {"weights": "int4/group32"},
            "its scales are per group32; for rows of 256 weights Quanto has one per group128",
        ),
        ({"weights": "int8/group32"}, "its scales are per group32; for rows of 256 weights Quanto has one per channel"),
        ({"preset": "int8dq"}, "its activations are dynamic"),
    ],
)
def test_what_quanto_cannot_hold_is_refused(config: dict[str, Any], words: str) -> None:
    model = nn.Sequential(nn.Linear(256, 3))
    fxquant.quantize(model, **config)
    with pytest.raises(NotForQuanto, match=words):
        to_quanto(model)


def test_kinds_that_quanto_leaves_are_written_as_floats() -> None:
    model: Any = nn.Sequential(nn.Conv1d(3, 4, 2))
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    state, written = to_quanto(model)
    assert written == {}
    assert set(state) == {"0.weight", "0.bias"}
    assert torch.equal(state["0.weight"], model[0].weight)


def test_scales_that_the_models_dtype_cannot_hold_are_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8)).half()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    fxquant.quantize(model, weights="int8")
    with pytest.raises(NotForQuanto, match=r"a scale does not fit torch\.float16"):
        to_quanto(model)


@pytest.mark.parametrize("part", ["_scale", "_shift", "_data._data"])
def test_a_missing_part_is_named(part: str, made: dict[str, Any]) -> None:
    state = dict(made["qint4"]["state"])
    del state[f"one.weight.{part}"]
    model = build(CASES["qint4"])
    with pytest.raises(StateDictMismatch, match=f"missing: 'one.weight.{part}'"):
        fxquant.requantize(model, state, made["qint4"]["map"])
    assert not any(isinstance(module, fxquant.QModule) for module in model.modules())


def test_codes_of_another_shape_are_named(made: dict[str, Any]) -> None:
    state = dict(made["qint8"]["state"])
    state["one.weight._data"] = state["one.weight._data"][:, :-1]
    with pytest.raises(StateDictMismatch, match=r"one.weight._data \(1, 255\)"):
        fxquant.requantize(build(CASES["qint8"]), state, made["qint8"]["map"])


def test_formats_that_quanto_has_not_are_named(made: dict[str, Any]) -> None:
    odd = {**made["qint8"]["map"], "one": {"weights": "qint8", "activations": "qint4"}}
    with pytest.raises(InvalidQuantizationMap, match="'one': Quanto has no weights 'qint8' with activations 'qint4'"):
        fxquant.requantize(build(CASES["qint8"]), made["qint8"]["state"], odd)


@pytest.mark.parametrize("name", FORMATS)
def test_quantos_names_are_formats_wherever_one_is_taken(name: str) -> None:
    kind = getattr(fxquant, name)
    assert number_format(name) is kind
    assert fxquant.TensorSpec.parse(f"{name}/channel").format is kind
    found = []
    for weights in (name, kind, f"{name}/channel"):
        model = nn.Linear(8, 4)
        fxquant.quantize(model, weights=weights)
        found.append(fxquant.quantization_map(model)[""]["weights"])
    assert found[0] == found[1]
    assert found[2] == f"{kind}/channel"
    if kind.bits == 8:
        for activations in (name, kind):
            model = nn.Linear(8, 4)
            fxquant.quantize(model, weights="qint8", activations=activations)
            assert fxquant.quantization_map(model)[""]["activations"] == f"{kind}/token"
