"""The checks see a spill, a byte at a time on the weight, a division in the loop, a product without its instruction."""

from __future__ import annotations

import pytest

from fxquant.target import ARCHS, Arch, KernelConfig
from tests.kernels_compile.checks import complaints, differences
from tests.kernels_compile.damaged import PROBLEM, facts_of_product

EVERY = pytest.mark.parametrize("arch", ARCHS.values(), ids=str)
TWO = pytest.mark.parametrize("arch", [ARCHS["sm80"], ARCHS["gfx942"]], ids=str)


def tile(m: int, n: int, k: int, warps: int = 4) -> KernelConfig:
    return KernelConfig.of("product", BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=2)


SOUND = tile(64, 64, 64)


@EVERY
def test_the_sound_kernel_passes(arch: Arch) -> None:
    assert complaints(PROBLEM, SOUND, facts_of_product(SOUND, arch), arch) == []


@TWO
def test_a_spill_is_seen(arch: Arch) -> None:
    config = tile(128, 64, 64, warps=1 if arch.backend == "hip" else 4)
    few_registers = {"waves_per_eu": 8} if arch.backend == "hip" else {"maxnreg": 32}
    found = complaints(PROBLEM, config, facts_of_product(config, arch, options=few_registers), arch)
    assert any("product spills: " in complaint for complaint in found)


@EVERY
def test_a_weight_that_is_read_by_the_byte_is_seen(arch: Arch) -> None:
    found = complaints(PROBLEM, SOUND, facts_of_product(SOUND, arch, stride=1025), arch)
    assert any("of weight a thread" in complaint for complaint in found)


@EVERY
def test_a_division_in_the_loop_is_seen(arch: Arch) -> None:
    found = complaints(PROBLEM, SOUND, facts_of_product(SOUND, arch, divides=True), arch)
    assert any("integer divisions in the loop" in complaint for complaint in found)


@TWO
def test_a_product_without_its_instruction_is_seen(arch: Arch) -> None:
    config = tile(16, 16, 32)
    found = complaints(PROBLEM, config, facts_of_product(config, arch, multiplies=True), arch)
    assert "no matrix instruction in the loop" in found


def test_shared_memory_beyond_the_target_is_seen() -> None:
    config = KernelConfig.of("product", BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=6)
    arch = ARCHS["sm89"]
    found = complaints(PROBLEM, config, facts_of_product(config, arch), arch)
    assert any("does not fit" in complaint for complaint in found)


def test_a_damaged_kernel_differs_from_its_facts_of_before() -> None:
    arch = ARCHS["sm80"]
    sound, damaged = facts_of_product(SOUND, arch), facts_of_product(SOUND, arch, stride=1025)
    assert differences(sound, sound) == []
    assert any("async_copies" in line or "global_loads" in line for line in differences(damaged, sound))
