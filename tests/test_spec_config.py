"""QuantConfig and its rules."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import InvalidOption, UnknownOption
from fxquant.spec import (
    FORMATS,
    NAMED_SPECS,
    PRESETS,
    Decision,
    QuantConfig,
    Rule,
    linear_spec,
)
from fxquant.spec.peers import TORCHAO
from tests.strategies import ACTIVATION, PATTERN, RULE, WEIGHT

# ---- rules


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


def test_a_peers_preset_is_kept_in_our_words() -> None:
    assert QuantConfig("int8_weight_only") == QuantConfig("int8wo")
    assert QuantConfig("int4_weight_only algorithm=hqq").preset == "int4wo algorithm=hqq"
    assert QuantConfig("w=int8 x=int8").preset == "w=int8/channel x=int8/token"


def test_the_algorithm_goes_where_it_fits() -> None:
    rules = {"a": "int4wo", "b": "int8wo", "c": "int4wo algorithm=mse", "d": None}
    config = QuantConfig("int2wo", rules=rules, algorithm="minmax", embeddings="int4")
    got = {path: config.spec_for(path).spec for path in "abcde"}
    algorithms = {path: None if spec is None else spec.algorithm for path, spec in got.items()}
    assert algorithms == {"a": "minmax", "b": "auto", "c": "mse", "d": None, "e": "minmax"}
    assert config.default_spec == linear_spec("int2wo algorithm=minmax")
    assert config.spec_for("e", "embedding").spec == linear_spec("w=int4 algorithm=minmax")
    assert QuantConfig.from_json(config.to_json()) == config


def test_one_fitting_rule_is_enough_for_an_algorithm() -> None:
    config = QuantConfig("int8dq", rules={"*.mlp": "int4wo"}, algorithm="minmax")
    assert config.default_spec == PRESETS["int8dq"]
    assert config.spec_for("a.mlp").spec == linear_spec("int4wo algorithm=minmax")


def test_embeddings_stay_float_unless_asked_for() -> None:
    stay = Decision(None, "embeddings stay float by default; give embeddings= or a rule")
    assert QuantConfig().spec_for("embed", "embedding") == stay
    assert QuantConfig(embeddings="none").spec_for("embed", "embedding") == stay
    config = QuantConfig(rules={"wte": "int8dq", "wpe": None}, embeddings="int4/group32", exclude="old", include="w*")
    dropped = "; an embedding has no activations, so no x=int8/token"
    assert config.spec_for("wte", "embedding") == Decision(
        PRESETS["int8wo"], f'rule "wte=w=int8/channel x=int8/token"{dropped}'
    )
    assert config.spec_for("wpe", "embedding") == Decision(None, 'rule "wpe=none"')
    assert config.spec_for("w", "embedding") == Decision(linear_spec("w=int4/group32"), 'embeddings "int4/group32"')
    assert config.spec_for("old", "embedding") == Decision(None, 'exclude "old"')
    assert config.spec_for("x", "embedding") == Decision(None, "not in include")
    assert config.spec_for("w").spec == PRESETS["int8dq"]


def test_a_rule_for_everything_is_a_default_and_names_no_embedding() -> None:
    config = QuantConfig(rules={"*": "int4wo"})
    assert config.spec_for("embed").spec == PRESETS["int4wo"]
    assert config.spec_for("embed", "embedding").spec is None
    assert config.with_fields(embeddings="int8").spec_for("embed", "embedding").spec == PRESETS["int8wo"]
    assert QuantConfig(rules={"e*": "int4wo"}).spec_for("embed", "embedding").spec == PRESETS["int4wo"]


def test_a_convolution_gets_the_linears_spec_per_sample() -> None:
    config = QuantConfig(rules={"mx": "mxfp8", "wo": "int8wo"})
    note = "; a convolution takes x=int8/token per sample"
    assert config.spec_for("c", "conv") == Decision(linear_spec("w=int8 x=int8/sample"), f"default{note}")
    assert config.spec_for("wo", "conv") == Decision(PRESETS["int8wo"], 'rule "wo=w=int8/channel"')
    assert config.spec_for("mx", "conv").spec == PRESETS["mxfp8wo"]
    assert "a convolution has no groups of features, so weights only" in config.spec_for("mx", "conv").reason
    assert config.default_for("conv") == config.spec_for("c", "conv")
    with pytest.raises(InvalidOption, match="'kind'"):
        config.spec_for("c", "convolution")


def test_mixed_recipe_of_one_config() -> None:
    """The example of docs/presets.md."""
    config = QuantConfig("int8wo", rules={"*.mlp.*": "int4wo", "*.attn.*": "int8dq", "lm_head": None})
    assert config.spec_for("layers.0.mlp.up").spec == PRESETS["int4wo"]
    assert config.spec_for("layers.0.attn.q").spec == PRESETS["int8dq"]
    assert config.spec_for("lm_head").spec is None
    assert config.spec_for("proj").spec == PRESETS["int8wo"]


def test_default_is_int8dq() -> None:
    config = QuantConfig()
    assert config.default_spec == PRESETS["int8dq"]
    assert config.spec_for("a.b") == Decision(PRESETS["int8dq"], "default")
    assert not config.has_path_rules


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
        ({"embeddings": "int8"}, True),
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
        ({"wrapper": "c++"}, "option 'wrapper' has the value 'c++': it takes 'python', 'cpp'."),
        ({"mode": "max_autotune"}, "did you mean 'max-autotune'?"),
        ({"algorithm": "absmx"}, "did you mean 'absmax'?"),
        ({"algorithm": "minmax"}, "minmax is for affine or shift weights, but int8/channel is symmetric; use 'auto'"),
        ({"algorithm": "minmax", "preset": "fp8wo", "embeddings": "int8"}, "minmax is for affine or shift weights"),
        ({"algorithm": "absmax", "preset": "int4wo"}, "absmax is for symmetric weights, but int4/group128/affine/bf16"),
        ({"algorithm": "mse", "preset": "int4wo algorithm=hqq"}, "no spec here leaves its algorithm open"),
        ({"algorithm": "mse", "weights": "none"}, "no spec here leaves its algorithm open"),
        ({"algorithm": None}, "it takes 'auto', 'absmax', 'minmax', 'mse', 'hqq'"),
        ({"training": True, "strict": True}, "it asks for kernels, and training runs on none"),
        ({"training": True, "numerics": True}, "errors are measured of inference"),
        ({"training": None}, "it takes True or False"),
        ({"autotune": "quick", "training": True}, "training runs on no kernel"),
        ({"autotune": "quik"}, "it takes 'none', 'quick', 'full'; did you mean 'quick'?"),
        ({"group_size": 0}, "it takes a whole number of at least 1"),
        ({"group_size": -32}, "it takes a whole number of at least 1"),
        ({"group_size": 32.0}, "it takes a whole number of at least 1"),
        ({"group_size": "32"}, "it takes a whole number of at least 1"),
        ({"group_size": 2**31}, "at most 2147483647"),
        ({"group_size": 64, "weights": "mxfp4"}, "the blocks of fp4_e2m1/group32/e8m0 are 32 values by definition"),
        ({"group_size": 32, "preset": "nvfp4"}, "the blocks of fp4_e2m1/group16/e4m3 are 16 values by definition"),
        ({"group_size": 64, "preset": "none"}, "it needs quantized weights; give weights or a preset"),
        ({"weights": "int8/group99999999999"}, "a group has at most 2147483647 values"),
        ({"embeddings": "int8/sample"}, "option 'embeddings' has the value 'int8/sample': weights are scaled per"),
        ({"embeddings": 4}, "it takes a format such as 'int8', a tensor spec such as 'int8/channel', or 'none'"),
        ({"preset": "int8dq w=none"}, "quantized activations need quantized weights; give weights too"),
        ({"preset": "x=int8"}, "quantized activations need quantized weights; give weights too"),
        ({"preset": "int8dq", "weights": "none"}, "quantized activations need quantized weights; give weights too"),
        ({"group_size": True}, "it takes a whole number of at least 1"),
        ({"group_size": 64, "weights": "int8/channel"}, "weights='int8/channel' says otherwise; give one of the two"),
        ({"group_size": 64, "weights": "none"}, "it needs quantized weights; give weights or a preset"),
        ({"activations": "int8"}, "quantized activations need quantized weights; give weights too"),
        (
            {"activations": "int8/channel", "weights": "int8"},
            "activations are scaled per tensor, token, sample or group<n>",
        ),
        ({"activations": "int4", "weights": "int8"}, "activations are int8 or a float format, symmetric"),
        ({"activations": "qint2", "weights": "int8"}, "activations are int8 or a float format, symmetric"),
        ({"activations": "int8/token/affine", "weights": "int8"}, "activations are int8 or a float format, symmetric"),
        ({"weights": "int8/token"}, "weights are scaled per tensor, channel, group<n> or block<r>x<c>, not per token"),
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


@pytest.mark.parametrize("options", [["preset"], "int8wo", 3])
def test_options_are_a_mapping(options: Any) -> None:
    with pytest.raises(InvalidOption, match="it takes a mapping of option names to values"):
        QuantConfig.from_options(options)


def test_blanks_around_a_format_do_not_count() -> None:
    config = QuantConfig(weights=" int8 ", activations="mxfp8 ", embeddings=" none")
    assert (config.weights, config.activations) == ("int8", "float8_e4m3fn/group32/e8m0")
    assert config.embeddings == "none"


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
    preset=st.sampled_from(["int8dq", *PRESETS, *TORCHAO, "int4wo algorithm=mse", "w=int3 x=mxfp8"]),
    rules=st.lists(RULE, max_size=3),
    weights=st.one_of(st.none(), WEIGHT, st.sampled_from(["int8", "int4", "fp8", "mxfp4", "qint2"])),
    activations=st.one_of(st.none(), st.just("none"), ACTIVATION),
    embeddings=st.one_of(st.none(), st.just("none"), WEIGHT, st.sampled_from([*FORMATS, *NAMED_SPECS])),
    algorithm=st.just("auto"),
    include=st.lists(PATTERN, max_size=2),
    exclude=st.lists(PATTERN, max_size=2),
    fuse=st.booleans(),
    executor=st.sampled_from(["inductor", "eager"]),
    wrapper=st.sampled_from(["python", "cpp"]),
    mode=st.sampled_from([None, "default", "reduce-overhead", "max-autotune"]),
    dump=st.sampled_from([None, "dump dir/ü"]),
    numerics=st.booleans(),
    strict=st.booleans(),
    autotune=st.sampled_from(["none", "quick", "full"]),
)


@settings(deadline=None)
@given(CONFIG)
def test_json_round_trip(config: QuantConfig) -> None:
    twin = QuantConfig.from_json(config.to_json())
    assert twin == config
    assert twin.default_spec == config.default_spec
    assert [rule.spec for rule in twin.rules] == [rule.spec for rule in config.rules]


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_of_a_preset(name: str) -> None:
    config = QuantConfig(name, rules={"*.mlp.*": f"{name} algorithm=mse"})
    assert QuantConfig.from_json(config.to_json()) == config
    assert config.default_spec == PRESETS[name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it is not JSON"),
        (None, "it is not JSON"),
        ("[1]", "it takes a JSON object of options"),
    ],
)
def test_json_that_is_none(text: Any, words: str) -> None:
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
