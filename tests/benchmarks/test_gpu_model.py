"""The page of the model of time: its figures are those that the code gives; and how tables are chosen."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import gpu_model_page, make_tables
from benchmarks.make_tables import Chooser, facts_key, like, standing_for, unsplit
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.tuning.candidates import TritonSpace
from fxquant.tuning.facts.record import Facts, HotLoop, LaunchFacts
from fxquant.tuning.plans.tables import TABLES, read_table, table_path

SM90 = ARCHS["sm90"]
PROBLEM = Problem("linear", 8, 768, 3072, "int8/channel", "int8/token", "bfloat16")
GOOD, SPILLS, WIDE = (KernelConfig.of("scaled_mm", BLOCK_M=64, BLOCK_N=n, BLOCK_K=128) for n in (64, 128, 256))


def facts(*, spills: int = 0, shared: int = 2**15) -> Facts:
    loop = HotLoop(is_loop=True, matrix={"IGMMA.64x64x32.S8.S8": 4}, operations=2 * 64 * 64 * 128, bulk_copies=2)
    return Facts((LaunchFacts("f", 64, spills, shared, 4, 0, {}, loop),))


def test_the_page_is_what_the_code_gives() -> None:
    assert gpu_model_page.PAGE.read_text(encoding="utf-8") == gpu_model_page.page(), (
        "run python -m benchmarks.gpu_model_page"
    )


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_a_shipped_table_is_small(arch: str) -> None:
    path = table_path(arch)
    assert not path.exists() or path.stat().st_size < 400 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_a_shipped_table_is_of_these_kernels(arch: str) -> None:
    """Entries of another source are not looked up: run `python -m benchmarks.make_tables` after changing a kernel."""
    space = TritonSpace(ARCHS[arch])
    for entry in {entry.config.kernel: entry for entry in read_table(arch).values()}.values():
        assert space.kernel_source(entry.config.kernel) == entry.kernel_source, entry.config.kernel


def test_facts_are_kept_for_all_that_the_table_chose() -> None:
    entries = [entry for problem, entry in read_table("sm90").items() if problem.dtype == make_tables.DTYPE]
    known = json.loads(make_tables.FACTS.read_text(encoding="utf-8")) if make_tables.FACTS.exists() else {}
    if table_path("sm90").parent == TABLES and table_path("sm90").exists():
        assert all(facts_key(entry.problem, entry.config) in known for entry in entries)


def chooser(monkeypatch: pytest.MonkeyPatch, known: dict[KernelConfig, Facts], minutes: float = 1.0) -> Chooser:
    class Space:
        def __init__(self, arch: object) -> None: ...
        def candidates(self, problem: Problem) -> tuple[KernelConfig, ...]:
            return SPILLS, WIDE, GOOD

        def kernel_source(self, kernel: str) -> str:
            return "source"

    def facts_of(problem: Problem, config: KernelConfig, arch: object) -> Facts:
        if config not in known:
            raise RuntimeError("a compiler's error")
        return known[config]

    monkeypatch.setattr(make_tables, "TritonSpace", Space)
    monkeypatch.setattr(make_tables, "facts_of", facts_of)
    return Chooser(SM90, time.monotonic() + 60 * minutes, 100)


def test_what_spills_passes_the_shared_memory_or_does_not_compile_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = chooser(monkeypatch, {SPILLS: facts(spills=1), WIDE: facts(shared=2**18), GOOD: facts()}).best(PROBLEM)
    assert found is not None
    assert found[0].config == GOOD
    assert found[0].source == "modelled"
    found = chooser(monkeypatch, {GOOD: facts()}).best(PROBLEM)
    assert found is not None
    assert found[0].config == GOOD
    assert chooser(monkeypatch, {SPILLS: facts(spills=1)}).best(PROBLEM) is None


def test_nothing_is_compiled_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    late = chooser(monkeypatch, {GOOD: facts()}, minutes=-1.0)
    assert late.best(PROBLEM) is None
    assert late.compiled == 0


def test_problems_that_stand_for_others() -> None:
    assert standing_for(PROBLEM, GOOD) == Problem("linear", 4096, 4096, 4096, *PROBLEM_FORMATS)
    of_rows = KernelConfig.of("coded_mv", BLOCK_N=64)
    assert (
        standing_for(PROBLEM, of_rows) == like(PROBLEM, of_rows) == Problem("linear", 8, 4096, 4096, *PROBLEM_FORMATS)
    )
    assert like(PROBLEM, GOOD) == Problem("linear", 8, 4096, 4096, *PROBLEM_FORMATS)
    odd = Problem("linear", 1, 40, 3000, *PROBLEM_FORMATS)
    assert like(odd, GOOD) == odd
    assert unsplit(KernelConfig.of("k", BLOCK_M=16, SPLIT_K=8)) == KernelConfig.of("k", BLOCK_M=16, SPLIT_K=2)


PROBLEM_FORMATS = PROBLEM.weights, PROBLEM.activations, PROBLEM.dtype


def test_a_run_writes_table_and_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make_tables, "Chooser", lambda *_: chooser(monkeypatch, {GOOD: facts()}))
    monkeypatch.setattr(make_tables, "FACTS", tmp_path / "facts.json")
    monkeypatch.setattr(make_tables, "write_table", lambda arch, entries: _written(tmp_path / arch, entries))
    assert make_tables.main(["--arch", "sm90", "--preset", "int8dq"]) == 0
    kept = json.loads((tmp_path / "facts.json").read_text())
    assert list(kept) == [facts_key(PROBLEM, GOOD)]
    assert Facts.from_json(kept[facts_key(PROBLEM, GOOD)]) == facts()


def _written(path: Path, entries: list[object]) -> Path:
    path.write_text(str(len(entries)))
    return path
