"""Files of plans: keys in clear, damage, other devices, two writers, sharing."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.errors import NotAPlanFile, OtherDevice, TuningCacheWarning
from fxquant.target import M_BUCKETS, KernelConfig, Problem
from fxquant.tuning import Entry, PlanCache, export_plans, import_plans
from fxquant.tuning.plans.cache import document, read_document, write_json
from fxquant.tuning.plans.device import Device, _generation
from fxquant.tuning.plans.records import merged
from tests.tuning.fakes import DEVICE, PROBLEM, A, B

ENTRY = Entry(PROBLEM, B, "tuned", "source-1", 1e-5, 2e-5, "quick")
OTHER = dataclasses.replace(ENTRY, problem=PROBLEM.with_m(64))

SIZE = st.integers(1, 2**20)
PROBLEMS = st.builds(
    Problem,
    op=st.sampled_from(["linear", "quantize", "embedding"]),
    m=st.sampled_from(M_BUCKETS),
    n=SIZE,
    k=SIZE,
    weights=st.sampled_from(["int8/channel", "int4/group128/affine", ""]),
    activations=st.sampled_from(["int8/token", ""]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    extra=st.sampled_from(["", "codes", "rmsnorm"]),
)
CONFIGS = st.builds(
    lambda kernel, values: KernelConfig(kernel, tuple(values.items())),
    st.sampled_from(["scaled_mm", "int8_linear_dynamic"]),
    st.dictionaries(st.sampled_from(["BLOCK_M", "BLOCK_N", "num_warps", "isa"]), st.integers(0, 512)),
)
ENTRIES = st.builds(
    Entry,
    problem=PROBLEMS,
    config=CONFIGS,
    source=st.sampled_from(["tuned", "modelled"]),
    kernel_source=st.text(max_size=20),
    seconds=st.floats(1e-9, 1e3),
    heuristic_seconds=st.floats(1e-9, 1e3),
    effort=st.sampled_from(["none", "quick", "full"]),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(ENTRIES, max_size=5))
def test_keys_and_entries_come_back_from_the_file(tmp_path: Path, found: list[Entry]) -> None:
    write_json(tmp_path / "file.json", document(DEVICE, found))
    device, entries = read_document(tmp_path / "file.json")
    assert device == DEVICE
    assert sorted(map(str, entries)) == sorted(map(str, found))


def test_the_file_says_its_key_in_clear_and_has_a_line_for_each_entry(tmp_path: Path) -> None:
    path = PlanCache(DEVICE, tmp_path).write([ENTRY, OTHER])
    assert path.name.startswith("plans-fake-gpu-sm90-")
    content = json.loads(path.read_text())
    assert content["device"]["name"] == "Fake GPU"
    assert content["entries"][0]["problem"]["weights"] == "int8/channel"
    assert sum('"problem"' in line for line in path.read_text().splitlines()) == 2


def test_the_folder_belongs_to_the_user_alone(plans: Path) -> None:
    path = PlanCache(DEVICE).write([ENTRY])
    assert path.parent == plans
    assert plans.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSONDecodeError"),
        ('{"format": 1', "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": 99}', "its format is 99, this version reads 1"),
        ('{"format": 1, "device": {"kind": "gpu"}, "entries": []}', "TypeError"),
    ],
)
def test_a_damaged_file_is_one_warning_that_names_it(tmp_path: Path, text: str, words: str) -> None:
    cache = PlanCache(DEVICE, tmp_path)
    cache.path.write_text(text)
    with pytest.warns(TuningCacheWarning) as caught:
        assert cache.read() == {}
    assert str(cache.path) in str(caught[0].message)
    assert words in str(caught[0].message)
    assert "Kernels run as their heuristics say" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read() == {}
        assert PlanCache(DEVICE, tmp_path).read() == {}
    assert PlanCache(DEVICE, tmp_path).write([ENTRY]) == cache.path
    assert cache.read() == {PROBLEM: ENTRY}


def test_a_file_of_another_device_is_a_warning_and_no_entries(tmp_path: Path) -> None:
    theirs = dataclasses.replace(DEVICE, name="Other GPU")
    cache = PlanCache(DEVICE, tmp_path)
    PlanCache(theirs, tmp_path).write([ENTRY]).rename(cache.path)
    with pytest.warns(TuningCacheWarning, match="of another device: name 'Other GPU' instead of 'Fake GPU'"):
        assert cache.read() == {}


@pytest.mark.parametrize("field", ["name", "arch", "fxquant", "torch", "triton", "caches"])
def test_each_part_of_the_key_has_a_file_of_its_own(tmp_path: Path, field: str) -> None:
    PlanCache(DEVICE, tmp_path).write([ENTRY])
    other = dataclasses.replace(DEVICE, **{field: "another"})
    assert PlanCache(other, tmp_path).read() == {}


def test_what_another_process_writes_is_seen(tmp_path: Path) -> None:
    ours, theirs = PlanCache(DEVICE, tmp_path), PlanCache(DEVICE, tmp_path)
    assert ours.read() == {}
    theirs.write([ENTRY])
    assert ours.read() == {PROBLEM: ENTRY}
    ours.write([OTHER])
    assert set(theirs.read()) == {PROBLEM, OTHER.problem}


def _write(folder: Path, start: int, together: Barrier) -> None:
    cache = PlanCache(DEVICE, folder)
    together.wait(timeout=30)
    for k in range(start, start + 40):
        cache.write([dataclasses.replace(ENTRY, problem=dataclasses.replace(PROBLEM, k=k))])


def test_two_processes_that_write_at_once_both_keep_their_entries(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    together = processes.Barrier(2)
    writers = [processes.Process(target=_write, args=(tmp_path, start, together)) for start in (1000, 2000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    entries = PlanCache(DEVICE, tmp_path).read()
    assert {problem.k for problem in entries} == {*range(1000, 1040), *range(2000, 2040)}
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".lock"]


def test_what_was_measured_is_not_replaced_by_what_was_not() -> None:
    modelled = dataclasses.replace(ENTRY, source="modelled", config=A, effort="none")
    assert merged([ENTRY], [modelled]) == {PROBLEM: ENTRY}
    assert merged([modelled], [ENTRY]) == {PROBLEM: ENTRY}
    of_new_kernel = dataclasses.replace(modelled, kernel_source="source-2")
    assert merged([ENTRY], [of_new_kernel]) == {PROBLEM: of_new_kernel}


def test_plans_travel_between_machines_of_one_kind(tmp_path: Path) -> None:
    here, there = PlanCache(DEVICE, tmp_path / "here"), PlanCache(DEVICE, tmp_path / "there")
    here.write([ENTRY])
    there.write([OTHER])
    assert export_plans(here, tmp_path / "plans.json") == 1
    assert import_plans(there, tmp_path / "plans.json") == 1
    assert there.read() == {PROBLEM: ENTRY, OTHER.problem: OTHER}


def test_plans_of_another_kind_are_refused(tmp_path: Path) -> None:
    here = PlanCache(DEVICE, tmp_path / "here")
    here.write([ENTRY])
    export_plans(here, tmp_path / "plans.json")
    there = PlanCache(dataclasses.replace(DEVICE, triton="4"), tmp_path / "there")
    with pytest.raises(OtherDevice, match=r"triton '3' instead of '4'\. Nothing has been imported"):
        import_plans(there, tmp_path / "plans.json")
    assert there.read() == {}
    with pytest.raises(NotAPlanFile, match="holds no tuned plans"):
        import_plans(there, tmp_path / "missing.json")


def test_the_name_of_a_device_is_readable() -> None:
    assert str(DEVICE) == "Fake GPU (sm90)"
    cpu = Device("cpu", "AMD EPYC", "avx2 avx512vnni", "48K 1024K", 2)
    assert str(cpu) == "AMD EPYC (avx2 avx512vnni; caches 48K 1024K; 2 threads)"
    assert Device.from_json(cpu.to_json()) == cpu


def test_cpus_of_one_name_are_told_apart_by_their_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr("fxquant.tuning.plans.device._CPU_INFO", file)
    assert _generation() == ""
    file.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n")
    assert _generation() == " (family 25, model 17)"
    file.write_text("processor\t: 0\nBogoMIPS\t: 100\n")
    assert _generation() == ""
