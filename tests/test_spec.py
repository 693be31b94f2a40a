from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fxquant.errors import InvalidSpec, UnknownFormat
from fxquant.spec import (
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FORMATS,
    INT4,
    INT8,
    NAMED_SPECS,
    Granularity,
    TensorSpec,
    number_format,
)
from tests.strategies import ANY_GRANULARITY, ANY_TENSOR

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
@given(ANY_GRANULARITY)
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


# ---- tensor specs


@settings(deadline=None)
@given(ANY_TENSOR)
def test_tensor_spec_round_trip(spec: TensorSpec) -> None:
    assert TensorSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "int8/channel",
        "int8/token",
        "float8_e4m3fn/tensor",
        "int4/group128/affine/bf16",
        "int2/group32/shift",
        "fp6_e3m2/channel-1",
        "float8_e4m3fn/block128x128",
        "fp4_e2m1/group16/e4m3",
    ],
)
def test_tensor_spec_text_is_canonical(text: str) -> None:
    assert str(TensorSpec.parse(text)) == text


def test_tensor_spec_reads_aliases_and_spells_them_out() -> None:
    assert str(TensorSpec.parse("fp8/channel/symmetric/float32")) == "float8_e4m3fn/channel"
    assert str(TensorSpec.parse("int4/group32/affine/bfloat16")) == "int4/group32/affine/bf16"


@pytest.mark.parametrize(("name", "text"), NAMED_SPECS.items())
def test_named_specs_are_read_and_written_out(name: str, text: str) -> None:
    assert str(TensorSpec.parse(name)) == text


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
        ("mxfp5", "did you mean 'mxfp"),
        ("int8/channel/affine/x", "a tensor spec is format/granularity"),
        (
            "int8/channel/bf16/affine",
            "a scheme is symmetric, affine or shift, and a scale float32, bf16, stepped, e8m0 or e4m3",
        ),
        ("int8/channel/afine", "did you mean 'affine'?"),
        ("fp8/channel/affine", "a zero point needs an integer format"),
        ("fp6_e3m2/channel/shift", "a zero point needs an integer format"),
        ("int8/group32/stepped", "stepped scales are for symmetric groups of int2, int3 or int4"),
        ("int4/group32/affine/e8m0", "e8m0 scales are for symmetric groups"),
        ("fp4_e2m1/channel/e4m3", "e4m3 scales are for symmetric groups"),
        ("int8/block0x4", "a granularity is tensor"),
    ],
)
def test_tensor_spec_refuses(text: str, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        TensorSpec.parse(text)
    assert words in str(caught.value)
