"""The form of shipped tables: what is written is read again."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fxquant.target import M_BUCKETS, KernelConfig, Problem
from fxquant.tuning.plans.compact import from_compact, to_compact
from fxquant.tuning.plans.records import Entry

A, B = KernelConfig.of("a", BLOCK_M=16, num_warps=4), KernelConfig.of("b", BLOCK_N=32)


def entry(m: int, config: KernelConfig = A, dtype: str = "bfloat16", n: int = 64) -> Entry:
    problem = Problem("linear", m, n, 128, "int8/channel", "int8/token", dtype)
    return Entry(problem, config, "modelled", f"hash of {config.kernel}", 2e-6, 3e-6)


def again(entries: list[Entry]) -> list[Entry]:
    table = json.loads(json.dumps(to_compact("sm90", entries)))
    return sorted(from_compact(table), key=lambda one: (str(one.problem), one.problem.m))


def test_entries_come_back() -> None:
    entries = [entry(1), entry(2), entry(4, B), entry(8, B, n=96), entry(8192, A, "float16")]
    assert again(entries) == sorted(entries, key=lambda one: (str(one.problem), one.problem.m))


def test_neighbouring_buckets_share_a_row() -> None:
    table = to_compact("sm90", [entry(m, A if m < 64 else B) for m in M_BUCKETS])
    assert [row[:3] for row in table["entries"][0]["rows"]] == [[1, 32, 0], [64, 8192, 1]]


def test_a_bucket_that_is_missing_stays_missing() -> None:
    table = to_compact("sm90", [entry(1), entry(4)])
    assert [row[:2] for row in table["entries"][0]["rows"]] == [[1, 1], [4, 4]]


def test_dtypes_with_the_same_rows_share_them() -> None:
    table = to_compact("sm90", [entry(1), entry(1, dtype="float16"), entry(1, B, "float32")])
    assert [fields["dtypes"] for fields in table["entries"]] == [["bfloat16", "float16"], ["float32"]]


def test_times_keep_three_digits() -> None:
    long = dataclasses.replace(entry(1), seconds=1.23456e-4)
    assert again([long])[0].seconds == pytest.approx(123e-6)


def test_another_form_is_refused() -> None:
    table = to_compact("sm90", [entry(1)])
    with pytest.raises(ValueError, match="format 1"):
        list(from_compact({**table, "format": 1}))
    with pytest.raises(ValueError, match="source 'tuned'"):
        list(from_compact({**table, "source": "tuned"}))
