"""lookup: which source counts, and what does not count."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxquant.errors import InvalidOption, NotAPlanFile, TuningCacheWarning
from fxquant.target import ARCHS, KernelConfig, Problem, Target
from fxquant.tuning import Entry, PlanCache, lookup
from fxquant.tuning.candidates import CpuSpace, cpu_space
from fxquant.tuning.plans.device import device_of, modelled_device
from fxquant.tuning.plans.tables import TABLES, older_arch, read_table, write_table
from tests.tuning.fakes import PROBLEM, A, B, FakeSpace

MODULE = sys.modules["fxquant.tuning.plans.lookup"]  # the package has the function under that name
CPU = Target("cpu", avx2=True, avx512=True, vnni=True, has_kernels=True)
ON_CPU = Problem("linear", 16, 64, 128, "int8/channel", "int8/token", "float32")
SM90 = Target("cuda", arch="sm90")


@pytest.fixture
def fake_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeSpace]:
    """Kernels that are given, for every target, and no shipped tables."""
    space = FakeSpace()
    monkeypatch.setattr(MODULE, "space_of", lambda target: space)
    monkeypatch.setattr(MODULE, "read_table", lambda arch: read_table(arch, tmp_path))
    MODULE._plan.cache_clear()
    yield space
    MODULE._plan.cache_clear()


def entry(config: KernelConfig = B, m: int = 16, source: str = "tuned", kernel_source: str = "source-1") -> Entry:
    return Entry(PROBLEM.with_m(m), config, source, kernel_source, 1e-5, 2e-5)  # pyright: ignore[reportArgumentType]


def test_without_knowledge_the_heuristic_answers(fake_space: FakeSpace, tmp_path: Path) -> None:
    (row,) = lookup(PROBLEM, SM90, tmp_path).rows
    assert (row.limit, row.config, row.source) == (8192, A, "heuristic")


def test_each_bucket_says_where_its_configuration_comes_from(fake_space: FakeSpace, tmp_path: Path) -> None:
    PlanCache(device_of(SM90), tmp_path).write([entry(m=16), entry(m=64, source="modelled")])
    rows = [(row.limit, row.config, row.source) for row in lookup(PROBLEM.with_m(3), SM90, tmp_path).rows]
    assert rows == [
        (8, A, "heuristic"),
        (16, B, "tuned"),
        (32, A, "heuristic"),
        (64, B, "modelled"),
        (8192, A, "heuristic"),
    ]


def test_the_users_file_comes_before_the_table_and_that_before_the_heuristic(
    fake_space: FakeSpace, tmp_path: Path
) -> None:
    write_table("sm90", [entry(A, 16, "modelled"), entry(B, 32, "modelled")], tmp_path)
    PlanCache(modelled_device("sm90"), tmp_path / "user").write([entry(B, 16, "tuned")])
    plan = lookup(PROBLEM, "sm90", tmp_path / "user")
    assert [(plan.row(m).config, plan.row(m).source) for m in (16, 32, 64)] == [
        (B, "tuned"),
        (B, "modelled"),
        (A, "heuristic"),
    ]


@pytest.mark.parametrize("kernel_source", ["source-0", ""])
def test_an_entry_of_another_source_does_not_count(fake_space: FakeSpace, tmp_path: Path, kernel_source: str) -> None:
    PlanCache(device_of(SM90), tmp_path).write([entry(kernel_source=kernel_source)])
    assert lookup(PROBLEM, SM90, tmp_path).row(16).source == "heuristic"


def test_an_entry_of_a_kernel_that_does_not_take_the_problem_does_not_count(
    fake_space: FakeSpace, tmp_path: Path
) -> None:
    fake_space.sources["other"] = "source-1"
    PlanCache(device_of(SM90), tmp_path).write([entry(KernelConfig.of("other", BLOCK_M=1))])
    assert lookup(PROBLEM, SM90, tmp_path).row(16).source == "heuristic"


def test_other_versions_and_devices_do_not_count(fake_space: FakeSpace, tmp_path: Path) -> None:
    here = device_of(SM90)
    for other in (dataclasses.replace(here, torch="0"), dataclasses.replace(here, arch="sm80")):
        PlanCache(other, tmp_path).write([entry()])
    assert lookup(PROBLEM, SM90, tmp_path).row(16).source == "heuristic"


def test_a_damaged_file_is_a_warning_and_the_heuristics_answer(fake_space: FakeSpace, tmp_path: Path) -> None:
    PlanCache(device_of(SM90), tmp_path).path.write_text("{")
    with pytest.warns(TuningCacheWarning, match="are not used"):
        plan = lookup(PROBLEM, SM90, tmp_path)
    assert plan.row(16).source == "heuristic"


def test_what_is_tuned_meanwhile_is_found(fake_space: FakeSpace, tmp_path: Path) -> None:
    assert lookup(PROBLEM, SM90, tmp_path).row(16).source == "heuristic"
    PlanCache(device_of(SM90), tmp_path).write([entry()])
    assert lookup(PROBLEM, SM90, tmp_path).row(16).source == "tuned"


def test_an_architecture_can_be_asked_for_and_hashed(fake_space: FakeSpace, tmp_path: Path) -> None:
    assert lookup(PROBLEM, ARCHS["sm90"], tmp_path) == lookup(PROBLEM, "sm90", tmp_path)
    assert len({*ARCHS.values()}) == len(ARCHS)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="did you mean 'sm90'"):
        lookup(PROBLEM, "sm91", tmp_path)


@pytest.mark.parametrize(
    ("arch", "older"), [("sm90", "sm89"), ("sm87", "sm80"), ("sm120", "sm100"), ("sm75", ""), ("gfx942", ""), ("x", "")]
)
def test_the_nearest_older_architecture(arch: str, older: str) -> None:
    assert older_arch(arch) == older


def test_an_architecture_without_a_table_has_the_nearest_older_ones(tmp_path: Path) -> None:
    write_table("sm80", [entry(source="modelled")], tmp_path)
    assert set(read_table("sm89", tmp_path)) == {PROBLEM}
    assert read_table("sm100", tmp_path) == read_table("sm80", tmp_path)
    assert read_table("gfx942", tmp_path) == {}


def test_a_damaged_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_table("sm80", [entry(source="modelled")], tmp_path)
    path.write_text(json.dumps({"format": 1, "arch": "sm90", "entries": []}))
    read_table.cache_clear()
    with pytest.raises(NotAPlanFile, match=r"sm80.json holds no table of configurations.*arch 'sm90'"):
        read_table("sm80", tmp_path)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_shipped_tables_are_whole(arch: str) -> None:
    for problem, found in read_table(arch).items():
        assert found.problem == problem.bucketed(), problem
        assert found.source == "modelled"
    assert TABLES.name == "tables"


def test_stepped_scales_are_bfloat16_ones_to_the_shipped_tables() -> None:
    stepped = Problem("linear", 0, 4096, 4096, "int4/group32/stepped", "int8/token", "bfloat16")
    plain = dataclasses.replace(stepped, weights="int4/group32/bf16")
    assert {row.source for row in lookup(plain, "sm90").rows} == {"modelled"}
    assert lookup(stepped, "sm90") == lookup(plain, "sm90")


def test_on_a_cpu_the_widest_instruction_set_is_the_heuristics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.tuning.candidates.cpu_space", lambda: CpuSpace((2, 1), "source"))
    MODULE._plan.cache_clear()
    PlanCache(device_of(CPU), tmp_path).write(
        [Entry(ON_CPU, KernelConfig.of("int8_linear_dynamic", isa=1), "tuned", "source", 1.0, 2.0, "quick")]
    )
    plan = lookup(ON_CPU, CPU, tmp_path)
    assert [(row.limit, row.config["isa"], row.source) for row in plan.rows] == [
        (8, 2, "heuristic"),
        (16, 1, "tuned"),
        (8192, 2, "heuristic"),
    ]


def test_this_cpu_has_instruction_sets_to_choose_from() -> None:
    space = cpu_space()
    assert space.isas[-1] == 1
    assert list(space.isas) == sorted(space.isas, reverse=True)
    assert not space.candidates(dataclasses.replace(ON_CPU, op="embedding"))
