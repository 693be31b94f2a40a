"""Module paths from what Dynamo writes down, and the choice of a product's own path."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fxquant.capture.names import attribute_names, best_path, common_path, owner, path_from_source


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['mha']._parameters['in_proj_weight']", "mha.in_proj_weight"),
        ("L['self']._modules['layers']._modules['0']._buffers['mean']", "layers.0.mean"),
        ("G['model'].layers[0].weight", "layers.0.weight"),
        ("L['self'].tables['a b']", "tables.a b"),
        ("L['w']", "w"),
        ("G['f'].__closure__[0].cell_contents._parameters['w']", "0.w"),
    ],
)
def test_path_from_source(source: str, path: str) -> None:
    assert path_from_source(source) == path


def test_attribute_names_are_unique_and_free() -> None:
    names = attribute_names(["a.b", "a_b", "training", "0.weight", "class", "x"], taken=["x"])
    assert names == ["a_b", "a_b_1", "training_1", "_0_weight", "_class", "x_1"]


@pytest.mark.parametrize(
    ("weight", "module"),
    [
        ("mlp.fc.weight", "mlp.fc"),
        ("weight", "weight"),
        ("experts.w1", "experts.w1"),
        ("fc.parametrizations.weight.original1", "fc"),
        ("fc.weight_v", "fc"),
    ],
)
def test_owner(weight: str, module: str) -> None:
    assert owner(weight) == module


@pytest.mark.parametrize(
    ("stack", "candidates", "named", "path"),
    [
        ("head", ["embed", "head"], True, "head"),  # tied: the module that the product is made in
        ("fc", ["layers.3.fc"], True, "layers.3.fc"),  # after a graph break the stack lacks its prefix
        ("mha", ["mha.out_proj"], False, "mha.out_proj"),  # a parameter read without calling its module
        ("decoder", ["embed"], True, "embed"),
        ("decoder", ["embed"], False, "decoder"),
        ("", ["embed", "head"], False, "embed"),
        ("block", [], True, "block"),
    ],
)
def test_best_path(stack: str, candidates: Sequence[str], named: bool, path: str) -> None:
    assert best_path(stack, candidates, named) == path


def test_common_path() -> None:
    assert common_path(["a.q.base", "a.q.lora_A.default"]) == "a.q"
    assert common_path(["a", "b"]) == ""
    assert common_path([]) == ""
