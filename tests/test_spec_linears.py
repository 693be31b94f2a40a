"""Linear specs, the presets and their spellings, and what convolutions and embeddings make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from fxquant.errors import InvalidOption, InvalidSpec, UnknownFormat, UnknownPreset
from fxquant.spec import PRESETS, LinearSpec, Rule, TensorSpec, linear_spec, preset
from fxquant.spec.kinds import KINDS, conv_spec, embedding_spec, spec_of_kind
from fxquant.spec.linears import ALGORITHMS, algorithm_problem
from fxquant.spec.peers import DIFFUSERS, TORCHAO
from fxquant.spec.presets import preset_text
from tests.strategies import LINEAR, QUANTIZED, RULE, WEIGHT

# ---- linear specs


@settings(deadline=None)
@given(LINEAR)
def test_linear_spec_round_trip(spec: LinearSpec) -> None:
    assert LinearSpec.parse(str(spec)) == spec
    assert linear_spec(str(spec)) == (None if spec.is_float else spec)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_round_trip(name: str) -> None:
    spec = PRESETS[name]
    assert LinearSpec.parse(str(spec)) == linear_spec(str(spec)) == linear_spec(name) == preset(name) == spec
    for side in (spec.weights, spec.activations):
        assert side is None or TensorSpec.parse(str(side)) == side


def test_text_where_a_spec_belongs_is_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"'int8/channel': a LinearSpec takes a TensorSpec or None a side; Linear"):
        LinearSpec("int8/channel", None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidSpec, match=r"'int8wo': a Rule takes a LinearSpec or None; Rule\.parse reads text"):
        Rule("a", "int8wo")  # pyright: ignore[reportArgumentType]


def test_linear_spec_text() -> None:
    assert str(PRESETS["int8dq"]) == "w=int8/channel x=int8/token"
    assert str(PRESETS["int4wo"]) == "w=int4/group128/affine/bf16"
    assert str(replace(PRESETS["int4wo"], algorithm="hqq")) == "w=int4/group128/affine/bf16 algorithm=hqq"
    assert str(LinearSpec(None, None)) == "w=none"
    assert LinearSpec.parse("x=int8/token algorithm=auto w=int8/channel") == PRESETS["int8dq"]
    assert LinearSpec.parse("w=int8/channel x=none") == PRESETS["int8wo"]


@pytest.mark.parametrize(
    "text",
    ["", "int8", "w=int8/channel w=int8/channel", "y=int8/channel", "w int8/channel", "w=", "w=int8/channel wx=int8"],
)
def test_linear_spec_refuses_the_form(text: str) -> None:
    with pytest.raises(
        InvalidSpec, match=r"a linear spec is 'w=format/granularity x=format/granularity algorithm=name'"
    ):
        LinearSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w=int8/token", "weights are scaled per tensor, channel, group<n> or block<r>x<c>, not per token"),
        ("w=int8/sample", "not per sample"),
        ("w=int8/group2147483648", "a group has at most 2147483647 values"),
        ("w=int8/block1x99999999999999999999", "a group has at most 2147483647 values"),
        (
            "w=int8/channel x=int8/channel",
            "activations are scaled per tensor, token, sample or group<n>, not per channel",
        ),
        ("w=int8/channel x=int8/block2x2", "not per block"),
        ("w=int8/channel x=int8/token/affine", "activations are int8 or a float format, symmetric"),
        ("w=int8/channel x=int8/token/shift", "activations are int8 or a float format, symmetric"),
        ("w=int8/channel x=int4/token", "activations are int8 or a float format, symmetric"),
        ("w=int8/channel x=int7/token", "activations are int8 or a float format, symmetric"),
        ("w=int8/channel x=int8/token/bf16", "scales of activations are float32, e8m0 or e4m3; leave 'bf16' out"),
        ("w=none algorithm=mse", "mse chooses codes of weights, but these stay float"),
        ("w=int8/channel algorithm=hqqq", "an algorithm is auto, absmax, minmax, mse, hqq; did you mean 'hqq'?"),
        ("w=int8/channel algorithm=minmax", "minmax is for affine or shift weights, but int8/channel is symmetric"),
        ("w=int4/group32/shift algorithm=absmax", "absmax is for symmetric weights, but int4/group32/shift is shift"),
    ],
)
def test_linear_spec_refuses_what_cannot_be(text: str, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        LinearSpec.parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "w=int8/channel x=float8_e5m2/tensor",
        "w=int8/channel x=fp6_e3m2/sample",
        "w=float8_e4m3fn/block128x128 x=float8_e4m3fn/group128",
        "w=int3/channel-1/shift x=fp4_e2m1/group16/e4m3 algorithm=hqq",
        "w=nvfp4 algorithm=mse",
    ],
)
def test_linear_spec_takes_what_the_grammar_promises(text: str) -> None:
    assert not LinearSpec.parse(text).is_float


@settings(deadline=None)
@given(WEIGHT)
def test_every_weight_has_one_plain_algorithm_and_the_searching_ones(weights: TensorSpec) -> None:
    fitting = [name for name in ALGORITHMS if not algorithm_problem(name, weights)]
    assert fitting == ["auto", "minmax" if weights.has_zero_point else "absmax", "mse", "hqq"]


@settings(deadline=None)
@given(RULE)
def test_rule_round_trip(rule: Rule) -> None:
    assert Rule.parse(str(rule)) == rule


# ---- presets


def test_presets_are_the_agreed_ones() -> None:
    mxfp8, mxfp6, mxfp4 = (f"{name}/group32/e8m0" for name in ("float8_e4m3fn", "fp6_e2m3", "fp4_e2m1"))
    nvfp4 = "fp4_e2m1/group16/e4m3"
    assert {name: str(spec) for name, spec in PRESETS.items()} == {
        "int8wo": "w=int8/channel",
        "int8dq": "w=int8/channel x=int8/token",
        "int4wo": "w=int4/group128/affine/bf16",
        "int4wo-g32": "w=int4/group32/affine/bf16",
        "int4dq": "w=int4/group32/stepped x=int8/token",
        "int2wo": "w=int2/group32/affine/bf16",
        "fp8wo": "w=float8_e4m3fn/channel",
        "fp8dq": "w=float8_e4m3fn/tensor x=float8_e4m3fn/tensor",
        "fp8dqrow": "w=float8_e4m3fn/channel x=float8_e4m3fn/token",
        "fp6_e3m2": "w=fp6_e3m2/channel",
        "fp6_e2m3": "w=fp6_e2m3/channel",
        "fp5_e2m2": "w=fp5_e2m2/channel",
        "fp4_e2m1": "w=fp4_e2m1/channel",
        "mxfp8": f"w={mxfp8} x={mxfp8}",
        "mxfp8wo": f"w={mxfp8}",
        "mxfp6wo": f"w={mxfp6}",
        "mxfp4": f"w={mxfp4} x={mxfp4}",
        "mxfp4wo": f"w={mxfp4}",
        "nvfp4": f"w={nvfp4} x={nvfp4}",
        "nvfp4wo": f"w={nvfp4}",
    }


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownPreset, match=r"unknown preset 'int8_dq'\. Did you mean 'int8dq'\?"):
        preset("int8_dq")
    with pytest.raises(UnknownPreset, match=r"Did you mean 'int8_weight_only'\?"):
        linear_spec("int8_weights_only")


def test_linear_spec_of_short_forms() -> None:
    assert linear_spec("int8wo") == linear_spec("w=int8/channel") == linear_spec(PRESETS["int8wo"])
    assert (
        linear_spec(None) is linear_spec("none") is linear_spec("w=none") is linear_spec(LinearSpec(None, None)) is None
    )


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("int4wo algorithm=hqq", "w=int4/group128/affine/bf16 algorithm=hqq"),
        ("int4wo  algorithm=auto", "w=int4/group128/affine/bf16"),
        (" int8dq x=none ", "w=int8/channel"),
        ("int8wo x=int8", "w=int8/channel x=int8/token"),
        ("int8dq w=int4/group32", "w=int4/group32 x=int8/token"),
        ("int8dq w=int4 algorithm=mse", "w=int4/group128/affine/bf16 x=int8/token algorithm=mse"),
        ("int4_weight_only algorithm=hqq", "w=int4/group128/affine/bf16 algorithm=hqq"),
        ("fpx_weight_only(3, 2) algorithm=mse", "w=fp6_e3m2/channel algorithm=mse"),
        ("w=int4 x=int8", "w=int4/group128/affine/bf16 x=int8/token"),
        ("w=mxfp4", "w=fp4_e2m1/group32/e8m0"),
        ("none w=int8", "w=int8/channel"),
    ],
)
def test_words_behind_a_name_change_the_preset(text: str, meaning: str) -> None:
    assert str(linear_spec(text)) == meaning
    assert linear_spec(preset_text(text)) == linear_spec(text)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", UnknownPreset, "unknown preset ''"),
        (" ", UnknownPreset, "unknown preset ''"),
        ("int4", UnknownPreset, "Did you mean 'int4wo'?"),
        ("int4wo hqq", InvalidSpec, "each word at most once"),
        ("int4wo algorithm=", InvalidSpec, "each word at most once"),
        ("int4wo algorithm=hqq algorithm=mse", InvalidSpec, "each word at most once"),
        ("int4wo algorithm=absmax", InvalidSpec, "absmax is for symmetric weights"),
        ("int4wo int8wo", InvalidSpec, "each word at most once"),
        ("int8dq w=int9", UnknownFormat, "Did you mean 'int8'?"),
        ("int8wo x=int4", InvalidOption, "activations are int8 or a float format"),
        ("int8wo w=int8/token", InvalidOption, "not per token"),
        (3, InvalidSpec, "give a preset's name"),
    ],
)
def test_linear_spec_refuses(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        linear_spec(text)
    assert words in str(caught.value)


# ---- spellings of peers


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("int8_weight_only", "int8wo"),
        ("Int8WeightOnlyConfig()", "int8wo"),
        ("int8_dynamic_activation_int8_weight", "int8dq"),
        ("int4_weight_only()", "int4wo"),
        ("Int4WeightOnlyConfig", "int4wo"),
        ("int8_dynamic_activation_int4_weight", "int4dq"),
        ("float8_weight_only", "fp8wo"),
        ("Float8DynamicActivationFloat8WeightConfig", "fp8dq"),
        ("float8dq_e4m3_row", "fp8dqrow"),
        ("float8wo_e5m2", "w=float8_e5m2/channel"),
        ("NVFP4WeightOnlyConfig", "nvfp4wo"),
        ("fpx_weight_only(3, 2)", "fp6_e3m2"),
        ("fpx_weight_only(ebits=2, mbits=1)", "fp4_e2m1"),
        ("FPXWeightOnlyConfig(2,2)", "fp5_e2m2"),
        ("fp7_e3m3", "w=fp7_e3m3/channel"),
        ("uint3wo", "w=int3/group64/affine/bf16"),
    ],
)
def test_a_peers_name_is_ours(name: str, meaning: str) -> None:
    assert linear_spec(name) == preset(name) == linear_spec(meaning)
    assert preset_text(name) == meaning


@pytest.mark.parametrize("meaning", [*TORCHAO.values(), *DIFFUSERS.values()])
def test_every_spelling_leads_to_a_recipe(meaning: str) -> None:
    assert meaning in PRESETS or str(LinearSpec.parse(meaning)) == meaning


@pytest.mark.parametrize(
    "name", ["float8wo", "IntxWeightOnlyConfig", "MXDynamicActivationMXWeightConfig", "uint1wo", "autoquant"]
)
def test_a_peers_name_that_means_several_things_is_refused(name: str) -> None:
    with pytest.raises(UnknownPreset, match=name):
        preset(name)


@pytest.mark.parametrize("name", ["fpx_weight_only(3, 9)", "fp6_e3m3", "fp3_e0m2"])
def test_a_small_float_that_cannot_be_is_an_unknown_format(name: str) -> None:
    with pytest.raises(UnknownFormat, match="unknown number format 'fp"):
        preset(name)


# ---- convolutions and embeddings


@pytest.mark.parametrize(
    ("text", "meaning", "note"),
    [
        ("int8wo", "int8wo", ""),
        ("int8dq", "w=int8/channel x=int8/sample", "; a convolution takes x=int8/token per sample"),
        ("fp8dq", "fp8dq", ""),
        ("w=int8 x=int8/sample", "w=int8 x=int8/sample", ""),
        ("mxfp4", "mxfp4wo", "; a convolution has no groups of features, so weights only, no x=fp4_e2m1/group32/e8m0"),
        (
            "int4dq algorithm=mse",
            "w=int4/group32/stepped x=int8/sample algorithm=mse",
            "; a convolution takes x=int8/token",
        ),
    ],
)
def test_a_convolution_reads_token_as_sample_and_leaves_groups_out(text: str, meaning: str, note: str) -> None:
    spec = linear_spec(text)
    assert spec is not None
    assert conv_spec(spec) == linear_spec(meaning)
    fitting, words = spec_of_kind(spec, "conv")
    assert fitting == conv_spec(spec)
    assert words.startswith(note)
    assert bool(words) == bool(note)


@settings(deadline=None)
@given(QUANTIZED)
def test_weights_are_the_same_for_every_kind(spec: LinearSpec) -> None:
    for kind in (kind for kind in KINDS if kind != "norm"):
        fitting, note = spec_of_kind(spec, kind)
        assert fitting is not None
        assert (fitting.weights, fitting.algorithm) == (spec.weights, spec.algorithm)
        assert bool(note) == (fitting != spec)
    assert embedding_spec(spec) == replace(spec, activations=None)
    assert conv_spec(conv_spec(spec)) == conv_spec(spec)


@settings(deadline=None)
@given(LINEAR)
def test_a_norm_takes_activations_that_stand_alone(spec: LinearSpec) -> None:
    fitting, note = spec_of_kind(spec, "norm")
    assert fitting == (spec if spec.weights is None and spec.activations is not None else None)
    assert bool(note) == (spec.weights is not None)


def test_activations_without_weights_are_a_spec() -> None:
    spec = LinearSpec.parse("x=int8/token")
    assert spec == linear_spec("x=int8") == linear_spec("int8dq w=none") == linear_spec("w=none x=int8/token")
    assert str(spec) == "w=none x=int8/token"
    assert not spec.is_float
    for refused in ("x=int8/channel", "x=int4", "x=int8/token algorithm=mse"):
        with pytest.raises((InvalidSpec, InvalidOption)):
            linear_spec(refused)


def test_a_kind_that_does_not_exist() -> None:
    with pytest.raises(InvalidOption, match=r"it takes 'linear', 'conv', 'embedding', 'norm'; did you mean 'conv'\?"):
        spec_of_kind(None, "conv2")
