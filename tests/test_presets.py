"""docs/presets.md says what the presets are: recipe, bits, error, others' names. And presets differ in their codes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxquant.algorithms import quantize
from fxquant.errors import InvalidOption, UnknownPreset
from fxquant.numerics import Codes, decode
from fxquant.spec import PRESETS, QuantConfig, TensorSpec, linear_spec
from fxquant.spec.peers import DIFFUSERS, TORCHAO

TEXT = (Path(__file__).parents[1] / "docs" / "presets.md").read_text()
SPECS = {str(spec.weights): spec.weights for spec in PRESETS.values() if spec.weights is not None}


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the table whose first heading is that, by the name in their first cell."""
    _, _, after = TEXT.partition(f"\n| {heading} |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in after.split("\n\n")[0].splitlines()[2:]]
    assert rows, heading
    return {row[0].strip("`"): row[1:] for row in rows}


def normal(rows: int = 1024, columns: int = 1024) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def relative_error(weight: Tensor, spec: TensorSpec, algorithm: str = "auto") -> float:
    found = quantize(weight, spec, algorithm)
    decoded = decode(found.codes, found.scale, found.zero_point, spec, torch.float32, found.tensor_scale)
    return ((decoded - weight).double().norm() / weight.double().norm()).item()


# ---- the document


@pytest.mark.parametrize("heading", ["preset | weights", "preset | how a linear runs on the CPU"])
def test_the_document_has_a_row_for_each_preset_and_no_other(heading: str) -> None:
    assert sorted(table(heading)) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_of_the_document_is_the_preset(name: str) -> None:
    number, granularity, scale, zero, activations, bits, error = table("preset | weights")[name]
    spec = PRESETS[name]
    assert spec.weights is not None
    assert (number, granularity, scale) == (str(spec.weights.format), str(spec.weights.granularity), spec.weights.scale)
    assert zero == {"symmetric": "none", "affine": "integer", "shift": "float"}[spec.weights.scheme]
    assert activations == str(spec.activations or "float")
    assert bits == f"{spec.weights.nbytes((4096, 4096)) * 8 / 4096**2:.2f}"
    assert error == f"{relative_error(normal(), spec.weights):.4f}"


@pytest.mark.parametrize("name", table("weights of"))
def test_the_errors_of_searching_algorithms_are_what_the_document_says(name: str) -> None:
    spec = PRESETS[name].weights
    assert spec is not None
    for algorithm, said in zip(("auto", "mse", "hqq"), table("weights of")[name], strict=True):
        # Three digits are said, and a better search may better the last one.
        assert abs(relative_error(normal(), spec, algorithm) - float(said)) <= 1e-3


def test_the_document_names_the_presets_that_share_weight_codes() -> None:
    paragraph = TEXT.split("**weight codes are equal**:")[1].split("All others differ")[0]
    named = [sorted(re.findall(r"`([^`]+)`", part)) for part in paragraph.split(";")]
    by_weights = [sorted(n for n, s in PRESETS.items() if str(s.weights) == text) for text in SPECS]
    assert sorted(named) == sorted(names for names in by_weights if len(names) > 1)


def test_the_names_of_others_in_the_document_are_accepted_and_mean_that_preset() -> None:
    for name, (torchao, diffusers, quanto) in table("preset | torchao").items():
        for spelling in re.findall(r"`([^`]+)`", f"{torchao} {diffusers}"):
            assert linear_spec(spelling) == PRESETS[name], spelling
        if quanto:
            options = dict(re.findall(r'(\w+)="?([^",`]+)"?', quanto))
            size = options.pop("group_size", None)
            config = QuantConfig(**options, group_size=None if size is None else int(size))
            assert config.default_spec == PRESETS[name], quanto


def test_the_document_names_every_spelling_that_is_accepted() -> None:
    assert [name for name in (*TORCHAO, *DIFFUSERS) if f"`{name}`" not in TEXT] == []


def test_the_table_of_bare_formats_is_what_they_mean() -> None:
    for names, (weights, activations) in table("a bare format").items():
        example = re.findall(r"\w+", names)[0]
        assert f"`{QuantConfig(weights=example).default_spec}`".replace("w=", "") == weights
        if activations == "refused":
            with pytest.raises(InvalidOption):
                QuantConfig("int8wo", activations=example)
        else:
            config = QuantConfig("int8wo", activations=example)
            assert f"w=int8/channel x={activations.strip('`')}" == str(config.default_spec)


# ---- the codes


def patterns(found: Codes) -> Tensor:
    return found.codes.view(torch.uint8)


def test_no_two_weight_specs_of_presets_give_equal_codes() -> None:
    """A preset that silently did another one's work would show here. Presets of equal weights: see the document."""
    weight = normal(64, 256)
    found = {text: patterns(quantize(weight, spec)) for text, spec in SPECS.items()}
    equal = [(a, b) for a, b in itertools.combinations(found, 2) if torch.equal(found[a], found[b])]
    assert equal == []


@pytest.mark.parametrize("columns", [1, 31, 160, 1000])
@pytest.mark.parametrize("text", SPECS)
def test_no_shape_is_left_out(text: str, columns: int) -> None:
    """Sizes that peers skip silently: here every row is quantized, the last group of a row may be shorter."""
    spec = SPECS[text]
    weight = normal(5, columns)
    found = quantize(weight, spec)
    assert found.codes.shape == weight.shape
    assert list(found.scale.shape) == spec.granularity.scale_shape(weight.shape)
    # Zeros in place of the weight would have an error of 1.
    assert relative_error(weight, spec) < 1


@pytest.mark.parametrize("size", [1000, 1001, 4096, 2**31 - 1])
def test_a_group_larger_than_a_row_is_the_row(size: int) -> None:
    weight = normal(5, 1000)
    config = QuantConfig(weights="int4", group_size=size)
    assert config.default_spec is not None
    assert config.default_spec.weights is not None
    whole = quantize(weight, TensorSpec.parse("int4/group1000/affine/bf16"))
    for got, want in zip(quantize(weight, config.default_spec.weights), whole, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["int4", "fp8", "int4/group64", "mxfp6"])
def test_a_format_where_a_preset_belongs_is_answered_with_what_to_write(name: str) -> None:
    with pytest.raises(UnknownPreset, match=f"A format is no preset: write 'w={name}'"):
        QuantConfig(rules={"*.mlp.*": name})
    assert QuantConfig(rules={"*.mlp.*": f"w={name}"}).rules[0].spec is not None
