"""What `weights`, `activations`, `embeddings` and `group_size` mean: formats by name, and what bare ones stand for."""

from __future__ import annotations

from typing import Any

import pytest

from fxquant.errors import UnknownFormat
from fxquant.spec import FORMATS, INT8, NAMED_SPECS, PRESETS, TENSOR, QuantConfig, TensorSpec, number_format


@pytest.mark.parametrize("name", [*FORMATS, "fp7_e3m3", "fp8_e5m2"])
def test_every_format_can_be_named_for_weights_and_embeddings(name: str) -> None:
    """int8 and floats are scaled per channel, narrower integers per group of 128 with a zero point."""
    number = number_format(name)
    grouped = number.kind == "int" and number.bits < 8
    want = f"{number}/group128/affine/bf16" if grouped else f"{number}/channel"
    assert str(QuantConfig(weights=name).default_spec) == f"w={want}"
    assert str(QuantConfig(embeddings=name).default_for("embedding").spec) == f"w={want}"
    regrouped = f"{number}/group48/affine/bf16" if grouped else f"{number}/group48"
    assert str(QuantConfig(weights=name, group_size=48).default_spec) == f"w={regrouped}"


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.kind == "float" or n == "int8"])
def test_every_float_and_int8_can_be_named_for_activations(name: str) -> None:
    assert str(QuantConfig("int8wo", activations=name).default_spec) == f"w=int8/channel x={name}/token"


@pytest.mark.parametrize(("name", "text"), NAMED_SPECS.items())
def test_every_block_format_can_be_named_on_each_side(name: str, text: str) -> None:
    config = QuantConfig(weights=name, activations=name, embeddings=name)
    assert str(config.default_spec) == f"w={text} x={text}"
    assert str(config.default_for("embedding").spec) == f"w={text}"


@pytest.mark.parametrize("option", ["weights", "activations", "embeddings"])
@pytest.mark.parametrize(
    ("name", "near"),
    [("int9", "int8"), ("mxfp5", "mxfp"), ("nvpf4", "nvfp4"), ("flaot8", "float8"), ("fp6_e3m3", "fp6_e")],
)
def test_an_unknown_format_names_the_nearest(option: str, name: str, near: str) -> None:
    with pytest.raises(UnknownFormat, match=rf"unknown number format '{name}'\. Did you mean '{near}"):
        QuantConfig.from_options({"preset": "int8wo", option: name})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": "int8"}, "w=int8/channel"),
        ({"weights": INT8}, "w=int8/channel"),
        ({"weights": TensorSpec(INT8, TENSOR)}, "w=int8/tensor"),
        ({"weights": "int4"}, "w=int4/group128/affine/bf16"),
        ({"weights": "int4", "group_size": 32}, "w=int4/group32/affine/bf16"),
        ({"weights": "int4", "group_size": 64, "activations": "int8"}, "w=int4/group64/affine/bf16 x=int8/token"),
        ({"weights": "int4/group64/shift", "activations": "int8"}, "w=int4/group64/shift x=int8/token"),
        ({"weights": "qint2"}, "w=int2/group128/affine/bf16"),
        ({"weights": "qint4", "activations": "qint8"}, "w=int4/group128/affine/bf16 x=int8/token"),
        ({"weights": "qfloat8", "activations": "qfloat8"}, "w=float8_e4m3fn/channel x=float8_e4m3fn/token"),
        ({"weights": "qfloat8_e5m2"}, "w=float8_e5m2/channel"),
        ({"weights": "qfloat8_e4m3fnuz"}, "w=float8_e4m3fnuz/channel"),
        ({"weights": "mxfp4"}, "w=fp4_e2m1/group32/e8m0"),
        ({"weights": "mxfp4", "group_size": 32}, "w=fp4_e2m1/group32/e8m0"),
        ({"weights": "nvfp4", "activations": "nvfp4"}, "w=fp4_e2m1/group16/e4m3 x=fp4_e2m1/group16/e4m3"),
        ({"weights": "int8", "activations": "mxfp8"}, "w=int8/channel x=float8_e4m3fn/group32/e8m0"),
        ({"weights": "fp6_e3m2", "group_size": 64}, "w=fp6_e3m2/group64"),
        ({"weights": "float8_e4m3fn/block128x128"}, "w=float8_e4m3fn/block128x128"),
        ({"preset": "int4_weight_only", "group_size": 32}, "w=int4/group32/affine/bf16"),
        ({"preset": "int4wo", "algorithm": "hqq"}, "w=int4/group128/affine/bf16 algorithm=hqq"),
        ({"preset": "int4wo algorithm=mse", "group_size": 32}, "w=int4/group32/affine/bf16 algorithm=mse"),
        ({"preset": "int8dq x=none"}, "w=int8/channel"),
        ({"preset": "w=int3 x=int8"}, "w=int3/group128/affine/bf16 x=int8/token"),
        ({"preset": "int8dq", "group_size": 64}, "w=int8/group64 x=int8/token"),
        ({"preset": "fp8dq", "algorithm": "mse"}, f"{PRESETS['fp8dq']} algorithm=mse"),
        ({"preset": "none"}, "None"),
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
        ({"preset": "int4wo", "group_size": 64}, "w=int4/group64/affine/bf16"),
        ({"weights": "none"}, "None"),
    ],
)
def test_what_the_short_forms_mean(options: dict[str, Any], text: str) -> None:
    config = QuantConfig.from_options(options)
    assert str(config.default_spec) == text
    assert QuantConfig.from_json(config.to_json()) == config
