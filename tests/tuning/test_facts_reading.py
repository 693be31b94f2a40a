"""From a configuration to its facts, and the cache of them. One small kernel, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fxquant.errors import DisassemblyFailed
from fxquant.target import ARCHS, KernelConfig, Problem
from fxquant.triton_kernels import KERNELS
from fxquant.tuning import compiling
from fxquant.tuning.compiling import launches_of, specialized
from fxquant.tuning.facts import Facts, HotLoop, LaunchFacts, facts_of, occupancy
from fxquant.tuning.facts.reading import disassembled

PROBLEM = Problem("quantize", 64, 0, 512, "", "int8/token", "bfloat16")
SM90 = ARCHS["sm90"]


def config() -> KernelConfig:
    return KERNELS["quantize_rows"].heuristic(PROBLEM, SM90)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path))
    return tmp_path / "facts"


def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiling.Specialized, "compiled", fail)


@pytest.mark.parametrize("arch", [SM90, ARCHS["gfx942"]], ids=str)
def test_facts_are_kept_in_clear_and_read_again(arch: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(arch, type(SM90))
    facts = facts_of(PROBLEM, config(), arch)
    assert facts.spills == 0
    assert 0 < facts.registers <= arch.max_registers
    assert facts.loop.total > 0
    [file] = folder.iterdir()
    content = json.loads(file.read_text())
    assert content["about"]["arch"] == arch.name
    assert content["about"]["config"] == config().to_json()
    no_compiling(monkeypatch)
    assert facts_of(PROBLEM, config(), arch) == facts


def test_problems_that_compile_alike_share_facts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(PROBLEM, config(), SM90)
    no_compiling(monkeypatch)
    assert facts_of(PROBLEM.with_m(128), config(), SM90) == facts


def test_what_changes_the_code_changes_the_key() -> None:
    [launch] = launches_of(PROBLEM, config())
    [odd] = launches_of(Problem("quantize", 64, 0, 511, "", "int8/token", "bfloat16"), config())
    keys = {specialized(launch, arch).key for arch in ARCHS.values()} | {specialized(odd, SM90).key}
    assert len(keys) == len(ARCHS) + 1


def test_a_broken_file_is_named_and_made_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = facts_of(PROBLEM, config(), SM90)
    [file] = folder.iterdir()
    file.write_text('{"facts": ')
    with caplog.at_level(logging.WARNING):
        assert facts_of(PROBLEM, config(), SM90) == facts
    assert str(file) in caplog.text
    assert json.loads(file.read_text())["facts"]


def test_without_a_folder_facts_are_only_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "file"))
    assert facts_of(PROBLEM, config(), SM90).registers > 0


def test_a_cubin_that_is_none_is_a_named_error() -> None:
    with pytest.raises(DisassemblyFailed, match="cuobjdump failed"):
        disassembled(b"no cubin")


def test_facts_survive_json() -> None:
    loop = HotLoop(True, {"IMMA.16832.S8.S8": 4}, 4096, async_copies={16: 2}, global_loads={2: 1}, total=9)
    facts = Facts((LaunchFacts("mm", 96, 0, 49152, 4, 0, {"mma.m16n8k32": 4}, loop),))
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_the_main_launch_is_the_one_that_multiplies() -> None:
    small, large = (
        LaunchFacts(name, 32, 1, shared, 4, 0, {}, HotLoop(True, operations=operations, total=5))
        for name, operations, shared in (("sum", 0, 64), ("product", 4096, 32))
    )
    facts = Facts((small, large))
    assert facts.main is large
    assert (facts.shared, facts.spills, facts.warps) == (64, 2, 4)


def test_a_kernel_that_launches_nothing_of_ours_has_no_facts() -> None:
    nothing = Facts(())
    assert (nothing.registers, nothing.spills, nothing.shared, nothing.main.loop.total) == (0, 0, 0, 0)


def test_share_of_wide_reads() -> None:
    loop = HotLoop(True, async_copies={16: 3}, global_loads={4: 2, 16: 1})
    assert loop.read_bytes == {4: 8, 16: 64}
    assert loop.wide_share == pytest.approx(64 / 72)
    assert HotLoop(True, bulk_copies=2).wide_share == 1.0


def test_occupancy_is_of_all_that_a_block_takes() -> None:
    fits = occupancy(LaunchFacts("mm", 128, 0, 100 * 1024, 4, 0, {}, HotLoop(True)), SM90)
    assert (fits.blocks, fits.limited_by) == (2, "shared memory")
    too_much = LaunchFacts("mm", 128, 0, 230 * 1024, 4, 0, {}, HotLoop(True))
    assert occupancy(too_much, SM90).blocks == 0
