"""Compiling ahead of time: the folder, its manifest, and that a launch finds its code there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from fxquant.errors import InvalidOption
from fxquant.target import ARCHS, Arch, KernelConfig, Plan, PlanRow, Problem
from fxquant.triton_kernels import KERNELS
from fxquant.triton_kernels.launching import OPTIONS
from fxquant.tuning.ahead import MANIFEST, Wanted, compile_ahead, wanted_of, with_quantizations
from fxquant.tuning.compiling import launches_of

PROBLEM = Problem("quantize", 0, 0, 512, "", "int8/token", "bfloat16")
A, B = KernelConfig.of("a", BLOCK_M=1), KernelConfig.of("b", BLOCK_M=16)


def plan(arch: Arch) -> Plan:
    return Plan((PlanRow(16, KERNELS["quantize_rows"].heuristic(PROBLEM.with_m(16), arch)),))


def made(folder: Path, arch: Arch, at: Path | None = None) -> list[dict[str, Any]]:
    return list(compile_ahead([PROBLEM.with_m(16)], arch, folder, at, plans=[plan(arch)]))


class Driver:
    """As much of a GPU's driver as Triton asks before it looks for compiled code."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.arch.backend, self.arch.compute, self.arch.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize("arch", [ARCHS["sm90"], ARCHS["gfx942"]], ids=str)
def test_a_launch_loads_what_was_compiled_ahead(arch: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [entry] = made(tmp_path / "out", arch)
    assert (tmp_path / "out" / entry["file"]).stat().st_size > 0
    hits: list[bool] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "out"))
    monkeypatch.setattr(knobs.compilation, "listener", lambda **kept: hits.append(kept["cache_hit"]))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(arch))
    for m in (16, 32):  # both multiples of 16
        config = plan(arch).rows[0].config
        [launch] = launches_of(PROBLEM.with_m(m), config)
        launch.function.device_caches.clear()
        # All that a launch does but for handing the code to the GPU.
        launch.function.run(*launch.args, grid=launch.grid, warmup=True, **{**OPTIONS, **launch.meta})
        launch.function.device_caches.clear()
    assert hits == [True, True]


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    arch = ARCHS["sm90"]
    entries = made(tmp_path, arch)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["kernels"] == entries
    assert (manifest["target"], manifest["triton"]) == ("sm90", triton.__version__)
    assert manifest["environment"] == {"TRITON_CACHE_DIR": str(tmp_path)}
    [entry] = entries
    assert entry["source_hash"] == KERNELS["quantize_rows"].source_hash
    assert Problem.from_json(entry["problem"]) == PROBLEM.with_m(16)
    assert entry["signature"]["x_ptr"] == "*bf16"


def test_the_index_can_name_the_place_on_the_server(tmp_path: Path) -> None:
    made(tmp_path, ARCHS["sm90"], Path("/srv/kernels"))
    [index] = tmp_path.glob("*/__grp__*.json")
    paths = json.loads(index.read_text())["child_paths"].values()
    assert {Path(path).parent for path in paths} == {Path("/srv/kernels") / index.parent.name}


def test_a_place_on_the_server_is_a_whole_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="give an absolute one"):
        made(tmp_path, ARCHS["sm90"], Path("kernels"))


def test_a_folder_that_is_not_finished_has_no_manifest(tmp_path: Path) -> None:
    made(tmp_path, ARCHS["sm90"])
    again = compile_ahead([PROBLEM.with_m(16)], ARCHS["sm90"], tmp_path, plans=[plan(ARCHS["sm90"])])
    next(again)
    again.close()  # as an interrupt does
    assert not (tmp_path / MANIFEST).exists()


def test_what_quantizes_activations_is_compiled_with_the_linears() -> None:
    on_codes = Problem("linear", 16, 64, 512, "int8/channel", "int8/token", "bfloat16")
    weight_only = Problem("linear", 16, 64, 512, "int8/channel", "", "bfloat16")
    problems = [on_codes.with_m(m) for m in (1, 16)] + [weight_only]
    assert with_quantizations(problems) == [PROBLEM, on_codes.with_m(0), weight_only.with_m(0)]


def rows_of(*limits: tuple[int, KernelConfig]) -> list[tuple[int, str]]:
    found = wanted_of(PROBLEM, Plan(tuple(PlanRow(limit, config) for limit, config in limits)))
    return [(one.problem.m, one.config.kernel) for one in found]


def test_every_row_of_a_plan_is_compiled_for_each_kind_of_number() -> None:
    assert rows_of((1, A), (16, B), (64, A)) == [
        (1, "a"), (15, "b"), (16, "b"), (63, "a"), (64, "a"), (65, "a"),
    ]  # fmt: skip
    assert rows_of((8, A)) == [(1, "a"), (8, "a"), (9, "a")]
    assert rows_of() == []


def test_a_problem_with_rows_wants_one_configuration() -> None:
    plan = Plan((PlanRow(16, A), PlanRow(64, B)))
    assert wanted_of(PROBLEM.with_m(20), plan) == [Wanted(PROBLEM.with_m(20), B)]
    assert wanted_of(PROBLEM.with_m(20), Plan(())) == []


def test_a_linear_is_compiled_with_each_epilogue(tmp_path: Path) -> None:
    problem, arch = Problem("linear", 1, 64, 64, "int8/channel", "", "float16"), ARCHS["gfx942"]
    plan = Plan((PlanRow(1, KERNELS["coded_mv"].heuristic(problem, arch)),))
    epilogues = ("", "bias", "bias+silu+residual")
    entries = list(compile_ahead([problem], arch, tmp_path, epilogues=epilogues, plans=[plan]))
    assert {entry["epilogue"] for entry in entries} == set(epilogues)


def test_an_epilogue_that_there_is_not_is_named(tmp_path: Path) -> None:
    problem, arch = Problem("linear", 1, 64, 64, "int8/channel", "", "float16"), ARCHS["gfx942"]
    plan = Plan((PlanRow(1, KERNELS["coded_mv"].heuristic(problem, arch)),))
    with pytest.raises(InvalidOption, match="'selu' is none of bias, residual, relu"):
        list(compile_ahead([problem], arch, tmp_path, epilogues=["bias+selu"], plans=[plan]))
