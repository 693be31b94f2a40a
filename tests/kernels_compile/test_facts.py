"""Each kernel for each target: what must hold of its machine code, and that it is what the table says."""

from __future__ import annotations

import pytest
import triton

from fxquant.numerics.tiles import scaled_by_blocks
from fxquant.spec import TensorSpec
from fxquant.target import ARCHS, Arch, Problem
from fxquant.triton_kernels import KERNELS, kernels_for
from fxquant.tuning.facts import Facts, facts_of
from fxquant.tuning.representative import representative, representative_of
from tests.kernels_compile import table
from tests.kernels_compile.checks import complaints, differences

ROWS = list(table.rows())
RENEW = f"If the change is meant: {table.COMMAND}; review facts.json as a diff."


def by_blocks(problem: Problem) -> bool:
    sides = [TensorSpec.parse(text) if text else None for text in (problem.weights, problem.activations)]
    return sides[0] is not None and scaled_by_blocks(sides[0], sides[1])


def test_the_table_is_of_the_installed_triton() -> None:
    made_with = table.read()["triton"]
    assert made_with == triton.__version__, (
        f"facts.json was made with triton {made_with}, triton {triton.__version__} is installed. {RENEW}"
    )


def test_the_table_has_the_rows_that_there_are() -> None:
    assert sorted(table.read()["rows"]) == sorted(row.key for row in ROWS), RENEW


def test_every_kernel_has_rows() -> None:
    assert {row.kernel for row in ROWS} == set(table.OURS)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=str)
def test_every_representative_problem_has_a_kernel(arch: Arch) -> None:
    without = [problem for problem in representative() if not kernels_for(problem, arch)]
    if not arch.scaled_dot:  # codes scaled by blocks on both sides: the reference runs them there
        without = [problem for problem in without if not by_blocks(problem)]
    assert not without, "\n".join(map(str, without))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_a_kernel_is_what_the_table_says(row: table.Row) -> None:
    facts = row.facts()
    assert complaints(row.problem, row.config, facts, row.arch) == []
    before = table.read()["rows"].get(row.key)
    assert before is not None, f"facts.json has no such row. {RENEW}"
    assert row.config.to_json() == before["config"], f"The kernel's own choice has changed. {RENEW}"
    assert differences(facts, Facts.from_json(before["launches"])) == [], RENEW


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS.values(), ids=str)
@pytest.mark.parametrize("kernel", table.OURS)
def test_what_a_kernel_chooses_for_every_representative_problem_is_sound(kernel: str, arch: Arch) -> None:
    rows = [table.Row(kernel, arch, problem) for problem in representative_of(kernel, arch)]
    found = [f"{row.key}: {line}" for row in rows for line in complaints(row.problem, row.config, row.facts(), arch)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_every_candidate_compiles_and_most_are_sound(row: table.Row) -> None:
    """A candidate may spill or not fit: tuning drops it by these facts. Not all may, and none divides in its loop."""
    bad = 0
    candidates = KERNELS[row.kernel].candidates(row.problem, row.arch)
    for config in candidates:
        lines = complaints(row.problem, config, facts_of(row.problem, config, row.arch), row.arch)
        bad += bool(lines)
        assert [line for line in lines if "spills" not in line and "fit" not in line and "local" not in line] == []
    assert bad <= len(candidates) / 2
