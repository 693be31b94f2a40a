"""What problems cost at least, computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from fxquant.target import ARCHS, Problem, Work
from fxquant.tuning.model.work import roofline_of, unit_of, weight_bytes, work_of, x_bytes

H100, A100, B200 = (ARCHS[name].board for name in ("sm90", "sm80", "sm100"))


def linear(weights: str, activations: str = "", m: int = 3, dtype: str = "bfloat16") -> Problem:
    return Problem("linear", m, 64, 256, weights, activations, dtype)


def test_int8_linear() -> None:
    work = work_of(linear("int8/channel", "int8/token"))
    x, weight, bias, result = 3 * 256 + 3 * 4, 64 * 256 + 64 * 4, 64 * 2, 3 * 64 * 2
    assert work == Work(2 * 3 * 64 * 256, "int8", x + weight + bias + result)


def test_int4_weight_only_with_scales_and_zero_points() -> None:
    work = work_of(linear("int4/group32/affine/bf16"))
    weight = 64 * 256 // 2 + 64 * 8 * (2 + 1)
    assert work == Work(2 * 3 * 64 * 256, "float16", 3 * 256 * 2 + weight + 64 * 2 + 3 * 64 * 2)


def test_a_weight_that_is_not_quantized() -> None:
    assert weight_bytes(linear("", dtype="float16")) == 64 * 256 * 2
    assert x_bytes(linear("")) == 3 * 256 * 2


def test_no_rows() -> None:
    assert work_of(linear("int8/channel", "int8/token", m=0)).operations == 0
    assert x_bytes(linear("int8/channel", "int8/token", m=0)) == 0


def test_quantize_and_norm() -> None:
    plain = work_of(Problem("quantize", 5, 0, 96, "", "int8/token", "bfloat16"))
    assert plain == Work(0, "float32", 5 * 96 * 2 + 5 * 96 + 5 * 4)
    behind = work_of(Problem("quantize", 5, 0, 96, "", "int8/token", "bfloat16", "layernorm"))
    assert behind.bytes - plain.bytes == 2 * 96 * 2


def test_embedding() -> None:
    work = work_of(Problem("embedding", 7, 1000, 64, "int8/channel", "", "float32"))
    assert work.bytes == 7 * 8 + 7 * 64 + 7 * 4 + 7 * 64 * 4


@pytest.mark.parametrize(
    ("weights", "activations", "dtype", "unit"),
    [
        ("int8/channel", "", "float32", "float32"),
        ("int8/channel", "", "float16", "float16"),
        ("int4/group32/bf16", "int8/token", "bfloat16", "int8"),
        ("float8_e4m3fn/channel", "float8_e4m3fn/token", "bfloat16", "float8"),
        ("mxfp4", "mxfp8", "bfloat16", "float8"),
        ("nvfp4", "nvfp4", "bfloat16", "float4"),
        ("float8_e4m3fn/channel", "int8/token", "bfloat16", "float16"),
    ],
)
def test_unit(weights: str, activations: str, dtype: str, unit: str) -> None:
    assert unit_of(linear(weights, activations, dtype=dtype)) == unit


def test_roofline_is_the_longer_of_two() -> None:
    moving = roofline_of(Work(10**6, "int8", 10**9), H100)
    assert moving.bound_by == "memory"
    assert moving.seconds == pytest.approx(1e9 / 3.35e12)
    assert moving.attainable == pytest.approx(moving.seconds / H100.attainable)
    computing = roofline_of(Work(10**15, "int8", 10), H100)
    assert computing.bound_by == "compute"
    assert computing.seconds == pytest.approx(1e15 / 1978.9e12)
    assert computing.attainable == pytest.approx(computing.seconds / H100.sustained["int8"])


def test_a_unit_that_a_board_lacks_is_the_next_wider() -> None:
    assert A100.unit("float8") == "float16"
    assert A100.unit("float4") == "float16"
    assert H100.unit("float4") == "float8"
    assert B200.unit("float4") == "float4"
    assert dataclasses.replace(A100, operations={"float32": 1e12}).unit("int8") == "float32"
    assert A100.rate("float8") == 312e12


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_boards_attain_no_more_than_their_data_sheets_say(name: str) -> None:
    board = ARCHS[name].board
    assert 0.5 < board.attainable <= 1
    assert set(board.sustained) <= set(board.operations)
    assert all(0.4 < share <= 1 for share in board.sustained.values())
    assert 1e-7 < board.launch < 1e-5
    assert 1e-7 < board.latency < 2e-6
