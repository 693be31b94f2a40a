from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import InvalidOption, InvalidSpec, UnknownFormat, UnknownOption, UnknownPreset
from fxquant.spec import (
    CHANNEL,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FORMATS,
    INT4,
    INT8,
    PRESETS,
    TENSOR,
    TOKEN,
    Decision,
    Granularity,
    LinearSpec,
    QuantConfig,
    Rule,
    TensorSpec,
    group,
    linear_spec,
    number_format,
    preset,
)

FORMAT = st.sampled_from(list(FORMATS.values()))
GROUP = st.integers(1, 4096).map(group)


@st.composite
def tensor_specs(draw: st.DrawFn, granularities: st.SearchStrategy[Granularity], affine: bool = True) -> TensorSpec:
    number = draw(FORMAT)
    scheme = "affine" if affine and number.kind == "int" and draw(st.booleans()) else "symmetric"
    return TensorSpec(number, draw(granularities), scheme)


WEIGHT = tensor_specs(st.one_of(st.sampled_from([TENSOR, CHANNEL]), GROUP))
ACTIVATION = tensor_specs(st.sampled_from([TENSOR, TOKEN]), affine=False).filter(lambda s: s.format is not INT4)
ANY_TENSOR = tensor_specs(st.one_of(st.sampled_from([TENSOR, CHANNEL, TOKEN]), GROUP))
LINEAR = st.one_of(
    st.builds(LinearSpec, WEIGHT, st.one_of(st.none(), ACTIVATION)),
    st.just(LinearSpec(None, None)),
)
PATTERN = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="._*?[]"), min_size=1)
RULE = st.builds(Rule, PATTERN, st.one_of(st.none(), LINEAR.filter(lambda s: not s.is_float)))


# ---- formats and granularities


def test_formats_are_what_their_dtypes_say() -> None:
    for number in (FLOAT8_E4M3FN, FLOAT8_E5M2):
        info = torch.finfo(number.storage)
        assert (number.qmin, number.qmax, number.bits) == (info.min, info.max, info.bits)
    assert (INT8.qmin, INT8.qmax, INT8.storage) == (-127, 127, torch.int8)
    assert (INT4.qmin, INT4.qmax, INT4.storage) == (-7, 7, torch.int8)


@pytest.mark.parametrize(
    ("alias", "name"), [("int8", "int8"), ("qint8", "int8"), ("fp8", "float8_e4m3fn"), ("e5m2", "float8_e5m2")]
)
def test_aliases(alias: str, name: str) -> None:
    assert number_format(alias) is FORMATS[name]


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UnknownFormat, match=r"unknown number format 'flaot8_e5m2'\. Did you mean 'float8_e5m2'\?"):
        number_format("flaot8_e5m2")


@settings(deadline=None)
@given(st.one_of(st.sampled_from([TENSOR, CHANNEL, TOKEN]), GROUP))
def test_granularity_round_trip(granularity: Granularity) -> None:
    assert Granularity.parse(str(granularity)) == granularity


@pytest.mark.parametrize("text", ["group", "group0", "group-1", "group012", "group1.5", "Group8", "row", "", "group8 "])
def test_granularity_refuses(text: str) -> None:
    with pytest.raises(InvalidSpec, match="a granularity is tensor, channel, token or group<n>, such as group128"):
        Granularity.parse(text)


def test_misspelt_granularity_names_the_nearest() -> None:
    with pytest.raises(InvalidSpec, match="did you mean 'channel'"):
        TensorSpec.parse("int8/chanel")
    with pytest.raises(InvalidSpec, match=r"did you mean 'group128'\?$"):
        TensorSpec.parse("int8/group0")


def test_only_a_group_has_a_size() -> None:
    with pytest.raises(InvalidSpec, match="a group, and only a group, has a size"):
        Granularity("channel", 3)
    with pytest.raises(InvalidSpec, match="a group, and only a group, has a size"):
        Granularity("group")


# ---- tensor and linear specs


@settings(deadline=None)
@given(ANY_TENSOR)
def test_tensor_spec_round_trip(spec: TensorSpec) -> None:
    assert TensorSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("text", ["int8/channel", "int8/token", "int4/group128/affine", "float8_e4m3fn/tensor"])
def test_tensor_spec_text_is_canonical(text: str) -> None:
    assert str(TensorSpec.parse(text)) == text


def test_tensor_spec_reads_aliases_and_spells_them_out() -> None:
    assert str(TensorSpec.parse("fp8/channel/symmetric")) == "float8_e4m3fn/channel"


@pytest.mark.parametrize(
    ("text", "codes", "dtype"),
    [
        ("int8/channel", (-127, 127), torch.int8),
        ("int4/channel", (-7, 7), torch.int8),
        ("int4/group32/affine", (0, 15), torch.uint8),
        ("int8/tensor/affine", (0, 255), torch.uint8),
        ("float8_e5m2/channel", (-57344.0, 57344.0), torch.float8_e5m2),
    ],
)
def test_range_and_dtype_of_codes(text: str, codes: tuple[float, float], dtype: torch.dtype) -> None:
    spec = TensorSpec.parse(text)
    assert (spec.qmin, spec.qmax) == codes
    assert spec.code_dtype == dtype


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int8", "a tensor spec is format/granularity"),
        ("int8/channel/affine/x", "a tensor spec is format/granularity"),
        ("int8/channel/afine", "a scheme is symmetric or affine; did you mean 'affine'?"),
        ("fp8/channel/affine", "a zero point needs an integer format"),
    ],
)
def test_tensor_spec_refuses(text: str, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        TensorSpec.parse(text)
    assert words in str(caught.value)


@settings(deadline=None)
@given(LINEAR)
def test_linear_spec_round_trip(spec: LinearSpec) -> None:
    assert LinearSpec.parse(str(spec)) == spec


def test_text_where_a_spec_belongs_is_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"'int8/channel': a LinearSpec takes a TensorSpec or None a side; Linear"):
        LinearSpec("int8/channel", None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidSpec, match=r"'int8wo': a Rule takes a LinearSpec or None; Rule\.parse reads text"):
        Rule("a", "int8wo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidSpec, match="spec 'w=none x=int8/token': quantized activations need quantized weights"):
        LinearSpec.parse("x=int8/token")


def test_linear_spec_text() -> None:
    assert str(PRESETS["int8dq"]) == "w=int8/channel x=int8/token"
    assert str(PRESETS["int4wo"]) == "w=int4/group128/affine"
    assert str(LinearSpec(None, None)) == "w=none"
    assert LinearSpec.parse("x=int8/token w=int8/channel") == PRESETS["int8dq"]
    assert LinearSpec.parse("w=int8/channel x=none") == PRESETS["int8wo"]


@pytest.mark.parametrize("text", ["", "int8", "w=int8/channel w=int8/channel", "y=int8/channel", "w int8/channel"])
def test_linear_spec_refuses_the_form(text: str) -> None:
    with pytest.raises(InvalidSpec, match="a linear spec is 'w=format/granularity x=format/granularity', each side"):
        LinearSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w=int8/token", "weights are scaled per tensor, channel or group<n>, not per token"),
        ("w=int8/channel x=int8/channel", "activations are scaled per token or tensor"),
        ("w=int8/channel x=int8/token/affine", "activations are int8 or float8, symmetric"),
        ("w=int8/channel x=int4/token", "activations are int8 or float8, symmetric"),
        ("x=int8/token", "quantized activations need quantized weights"),
    ],
)
def test_linear_spec_refuses_what_cannot_be(text: str, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        LinearSpec.parse(text)


def test_presets_are_the_agreed_ones() -> None:
    assert {name: str(spec) for name, spec in PRESETS.items()} == {
        "int8wo": "w=int8/channel",
        "int8dq": "w=int8/channel x=int8/token",
        "int4wo": "w=int4/group128/affine",
        "int4wo-g32": "w=int4/group32/affine",
        "fp8wo": "w=float8_e4m3fn/channel",
    }


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownPreset, match=r"unknown preset 'int8_dq'\. Did you mean 'int8dq'\?"):
        preset("int8_dq")


def test_linear_spec_of_short_forms() -> None:
    assert linear_spec("int8wo") == linear_spec("w=int8/channel") == linear_spec(PRESETS["int8wo"])
    assert (
        linear_spec(None) is linear_spec("none") is linear_spec("w=none") is linear_spec(LinearSpec(None, None)) is None
    )


# ---- rules


@settings(deadline=None)
@given(RULE)
def test_rule_round_trip(rule: Rule) -> None:
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("model.layers.0", "model.layers.0", True),
        ("model.layers.0", "model.layers.0.mlp.up", True),
        ("model.layers.1", "model.layers.10.mlp.up", False),
        ("*.mlp.*", "model.layers.0.mlp.up", True),
        ("*.mlp", "model.layers.0.mlp.up", True),
        ("*.mlp.*", "mlp.up", False),
        ("layers.[01]", "layers.1.q", True),
        ("LM_HEAD", "lm_head", False),
        ("*", "", True),
        ("up", "model.up", False),
    ],
)
def test_a_glob_matches_the_path_or_a_parent(pattern: str, path: str, hit: bool) -> None:
    config = QuantConfig(rules={pattern: None})
    assert (config.spec_for(path).spec is None) == hit
    assert config.unmatched([path]) == (() if hit else (pattern,))


# ---- QuantConfig


def test_default_is_int8dq() -> None:
    config = QuantConfig()
    assert config.default_spec == PRESETS["int8dq"]
    assert config.spec_for("a.b") == Decision(PRESETS["int8dq"], "default")
    assert not config.has_path_rules


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": "int8"}, "w=int8/channel"),
        ({"weights": INT8}, "w=int8/channel"),
        ({"weights": TensorSpec(INT8, TENSOR)}, "w=int8/tensor"),
        ({"weights": "int4"}, "w=int4/group128/affine"),
        ({"weights": "int4", "group_size": 32}, "w=int4/group32/affine"),
        ({"weights": "int8", "group_size": 64}, "w=int8/group64"),
        ({"weights": "int4/group64"}, "w=int4/group64"),
        ({"weights": "int4/group64", "group_size": 64}, "w=int4/group64"),
        ({"weights": "fp8"}, "w=float8_e4m3fn/channel"),
        ({"weights": "int8", "activations": "int8"}, "w=int8/channel x=int8/token"),
        ({"weights": "int8", "activations": "int8/tensor"}, "w=int8/channel x=int8/tensor"),
        ({"weights": "qint8", "activations": "none"}, "w=int8/channel"),
        ({"preset": "int8dq", "activations": "none"}, "w=int8/channel"),
        ({"preset": "int8dq", "weights": "int8/tensor"}, "w=int8/tensor x=int8/token"),
        ({"preset": "int8wo", "activations": "int8"}, "w=int8/channel x=int8/token"),
        ({"preset": "int4wo", "group_size": 64}, "w=int4/group64/affine"),
        ({"weights": "none"}, "None"),
    ],
)
def test_what_the_short_forms_mean(options: dict[str, Any], text: str) -> None:
    config = QuantConfig.from_options(options)
    assert str(config.default_spec) == text
    assert QuantConfig.from_json(config.to_json()) == config


def test_last_matching_rule_wins_and_is_named() -> None:
    config = QuantConfig(rules={"*.mlp": "int8wo", "*.mlp.down": None, "nothing": "int4wo"})
    assert config.spec_for("a.mlp.up") == Decision(PRESETS["int8wo"], 'rule "*.mlp=w=int8/channel"')
    assert config.spec_for("a.mlp.down") == Decision(None, 'rule "*.mlp.down=none"')
    assert config.spec_for("a.attn.q") == Decision(PRESETS["int8dq"], "default")
    assert config.unmatched(["a.mlp.up", "a.mlp.down", "a.attn.q"]) == ("nothing",)


def test_include_rules_and_exclude() -> None:
    config = QuantConfig(include="*.mlp", rules={"lm_head": "int8wo", "*.up": "int8wo"}, exclude=["*.0.mlp.up"])
    assert config.spec_for("l.1.mlp.down") == Decision(PRESETS["int8dq"], 'include "*.mlp"')
    assert config.spec_for("l.1.attn.q") == Decision(None, "not in include")
    assert config.spec_for("lm_head").spec == PRESETS["int8wo"]
    assert config.spec_for("l.0.mlp.up") == Decision(None, 'exclude "*.0.mlp.up"')
    assert config.has_path_rules
    assert config.patterns == ("*.mlp", "lm_head", "*.up", "*.0.mlp.up")


@pytest.mark.parametrize(("options", "needs"), [({"rules": {"*": "int8wo"}}, False), ({"exclude": "a*"}, True)])
def test_only_a_bare_star_needs_no_paths(options: dict[str, Any], needs: bool) -> None:
    assert QuantConfig(**options).has_path_rules == needs


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ({}, False),
        ({"exclude": "a", "executor": "eager"}, False),
        ({"preset": "int8dq"}, True),
        ({"weights": "int8"}, True),
        ({"activations": "none"}, True),
        ({"group_size": 64}, True),
        ({"rules": {"a": "int8wo"}}, True),
    ],
)
def test_a_config_that_names_a_format_asks_for_something(options: dict[str, Any], asks: bool) -> None:
    assert QuantConfig(**options).asks_for_something == asks


def test_rules_take_many_forms() -> None:
    want = (Rule("a", None), Rule("b", PRESETS["int8wo"]))
    assert QuantConfig(rules={"a": None, "b": "int8wo"}).rules == want
    assert QuantConfig(rules=[("a", None), ("b", PRESETS["int8wo"])]).rules == want
    assert QuantConfig(rules=["a=none", "b=w=int8/channel"]).rules == want
    assert QuantConfig(rules=want).rules == want


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fuse": "yes"}, "option 'fuse' has the value 'yes': it takes True or False."),
        ({"numerics": 1}, "option 'numerics' has the value 1: it takes True or False."),
        ({"executor": "aot"}, "option 'executor' has the value 'aot': it takes 'inductor', 'eager'."),
        ({"mode": "max_autotune"}, "did you mean 'max-autotune'?"),
        ({"algorithm": "absmx"}, "did you mean 'absmax'?"),
        ({"algorithm": "minmax"}, "it is for affine weights, but these are symmetric; use 'auto'"),
        ({"algorithm": "absmax", "preset": "int4wo"}, "it is for symmetric weights, but these are affine; use 'auto'"),
        ({"training": True}, "training is not supported by this version; leave it False"),
        ({"training": None}, "it takes True or False"),
        ({"autotune": "quick"}, "autotuning is not supported by this version; leave it 'none'"),
        ({"autotune": "quik"}, "it takes 'none', 'quick', 'full'; did you mean 'quick'?"),
        ({"group_size": 0}, "it takes a whole number of at least 1"),
        ({"group_size": True}, "it takes a whole number of at least 1"),
        ({"group_size": 64, "weights": "int8/channel"}, "weights='int8/channel' says otherwise; give one of the two"),
        ({"group_size": 64, "weights": "none"}, "it needs quantized weights; give weights or a preset"),
        ({"activations": "int8"}, "quantized activations need quantized weights; give weights too"),
        ({"activations": "int8/channel", "weights": "int8"}, "activations are scaled per token or tensor"),
        ({"activations": "int4", "weights": "int8"}, "activations are int8 or float8, symmetric"),
        ({"weights": "int8/token"}, "weights are scaled per tensor, channel or group<n>"),
        ({"weights": 8}, "it takes a format such as 'int8', a tensor spec such as 'int8/channel', or 'none'"),
        ({"include": 3}, "it takes a glob over module paths, or a sequence of them"),
        ({"exclude": [3]}, "it takes a glob over module paths, or a sequence of them"),
        ({"exclude": ""}, "it takes a glob over module paths, or a sequence of them"),
        ({"rules": "lm_head=none"}, "it takes a mapping {glob: spec} or a sequence of rules"),
        ({"rules": [3]}, "a rule is 'pattern=spec', a pair (pattern, spec) or a Rule"),
        ({"dump": 3}, "it takes the path of a folder"),
    ],
)
def test_invalid_options_say_what_they_take(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        QuantConfig.from_options(options)
    assert words in str(caught.value)


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(
        UnknownOption, match=r"unknown option 'excludes'\. Did you mean 'exclude'\? Known: preset, rules"
    ):
        QuantConfig.from_options({"excludes": "a"})


def test_no_options_is_the_default() -> None:
    assert QuantConfig.from_options(None) == QuantConfig.from_options({}) == QuantConfig()


def test_dump_takes_a_path() -> None:
    assert QuantConfig(dump=pathlib.Path("a") / "b").dump == str(pathlib.Path("a", "b"))


def test_is_frozen_hashable_and_replaceable() -> None:
    config = QuantConfig(rules={"a": None}, weights="int8")
    assert hash(config) == hash(QuantConfig(rules={"a": None}, weights="int8"))
    assert dataclasses.replace(config, strict=True) == QuantConfig(rules={"a": None}, weights="int8", strict=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.fuse = False  # pyright: ignore[reportAttributeAccessIssue]


CONFIG = st.builds(
    QuantConfig,
    preset=st.sampled_from([None, *PRESETS]),
    rules=st.lists(RULE, max_size=3),
    weights=st.one_of(st.none(), WEIGHT, st.sampled_from(["int8", "int4", "fp8"])),
    include=st.lists(PATTERN, max_size=2),
    exclude=st.lists(PATTERN, max_size=2),
    fuse=st.booleans(),
    executor=st.sampled_from(["inductor", "eager"]),
    mode=st.sampled_from([None, "default", "reduce-overhead", "max-autotune"]),
    dump=st.sampled_from([None, "dump dir/ü"]),
    numerics=st.booleans(),
    strict=st.booleans(),
)


@settings(deadline=None)
@given(CONFIG)
def test_json_round_trip(config: QuantConfig) -> None:
    assert QuantConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("text", "words"), [("{", "it is not JSON"), ("[1]", "it takes a JSON object of options")])
def test_json_that_is_none(text: str, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        QuantConfig.from_json(text)


def test_json_with_an_unknown_field() -> None:
    with pytest.raises(UnknownOption, match="unknown option 'colour'"):
        QuantConfig.from_json('{"colour": 1}')


def test_with_fields_replaces_some_and_keeps_the_rest() -> None:
    config = QuantConfig("int8wo", rules={"lm_head": None}, exclude="*.gate", fuse=False)
    changed = config.with_fields(executor="eager", fuse=True)
    assert (changed.preset, changed.rules, changed.exclude) == (config.preset, config.rules, config.exclude)
    assert (changed.executor, changed.fuse, config.fuse) == ("eager", True, False)
    with pytest.raises(UnknownOption, match="'executor'"):
        config.with_fields(exekutor="eager")
