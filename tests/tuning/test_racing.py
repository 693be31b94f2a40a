"""Racing and pruning, with a clock and facts that are given."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from fxquant.target import ARCHS, KernelConfig
from fxquant.tuning.measuring.racing import FULL, QUICK, Timing, hopeful, race
from fxquant.tuning.pruning import alike, ranked, shortlist, why_drop
from tests.tuning.fakes import PROBLEM, A, B, C, D, FakeBench, FakeFacts, tile

SM90 = ARCHS["sm90"]


def test_the_fastest_wins_and_the_heuristic_is_timed_beside_it() -> None:
    bench = FakeBench({A: [4.0], B: [2.0], C: [3.0]})
    result = race([A, B, C], bench.sample, QUICK)
    assert (result.winner, result.seconds, result.heuristic_seconds) == (B, 2.0, 4.0)


def test_a_gain_within_the_noise_leaves_the_heuristic() -> None:
    noisy = [1.0, 1.4, 0.8, 1.3, 0.9]
    bench = FakeBench({A: [1.05 * time for time in noisy * 9], B: noisy * 9})
    result = race([A, B], bench.sample, FULL)
    assert result.winner == A
    assert result.seconds == result.heuristic_seconds


def test_luck_in_the_race_does_not_count_in_the_final() -> None:
    lucky = [0.5] * QUICK.rounds + [1.0]  # fast until the final
    result = race([A, B], FakeBench({A: [1.0], B: lucky}).sample, QUICK)
    assert result.winner == A


def test_hopeless_ones_are_given_up_after_one_sample_and_losers_after_three() -> None:
    bench = FakeBench({A: [1.0], B: [10.0], C: [1.5], D: [1.01]})
    result = race([A, B, C, D], bench.sample, FULL)
    assert result.winner == A
    assert result.out == (B, C)
    assert (bench.samples.count(B), bench.samples.count(C)) == (1, 3)
    assert bench.samples.count(D) == FULL.rounds


def test_turns_alternate() -> None:
    bench = FakeBench({A: [1.0], B: [1.0]})
    race([A, B], bench.sample, QUICK)
    turns = list(zip(bench.samples[::2], bench.samples[1::2], strict=True))
    assert turns == [(A, B), (B, A), (A, B), (B, A), (A, B)]


def test_a_machine_that_slows_down_slows_all_alike() -> None:
    clock = itertools.count(1)

    def sample(config: KernelConfig) -> float:
        return (0.5 if config == B else 1.0) * (1 + 0.002 * next(clock))

    assert race([A, B], sample, FULL).winner == B
    assert race([B, A], sample, FULL).winner == B


def test_a_probe_keeps_the_heuristic_and_drops_what_is_far_behind() -> None:
    bench = FakeBench({}, probes={A: 9.0, B: 1.0, C: 2.0, D: 4.0})
    assert hopeful([A, B, C, D], bench.probe) == [A, B, C]


def test_spread_is_the_distance_of_the_quartiles() -> None:
    assert Timing((1.0,)).spread == 0.0
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).spread == 2.0
    assert Timing((1.0, 1.0, 1.0, 1.0, 100.0)).spread == 0.0


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (FakeFacts(), ""),
        (FakeFacts(spills=4), "it spills registers (4 instructions or registers)"),
        (FakeFacts(shared=300_000), "it needs 300000 bytes of shared memory, a block has 232448"),
        (FakeFacts(registers=255, warps=16), "16 warps of 255 registers a thread pass the processor's 65536"),
        (FakeFacts(registers=255, warps=8), ""),
    ],
)
def test_what_compiling_says_rules_a_configuration_out(facts: FakeFacts, words: str) -> None:
    assert why_drop(facts, SM90) == words


def test_what_is_left_is_ranked_by_the_model() -> None:
    facts = {A: FakeFacts(), B: FakeFacts(spills=1), C: FakeFacts()}
    seconds = {A: 3.0, C: 2.0}
    order, dropped = ranked(PROBLEM, [A, B, C], SM90, lambda p, c, a: facts[c], lambda p, c, a, f: seconds[c])
    assert [one.config for one in order] == [C, A]
    assert [(out.config, out.reason[:9]) for out in dropped] == [(B, "it spills")]


def test_a_short_list_has_the_best_guesses_of_each_kernel() -> None:
    other, another, library = tile(16, "other"), tile(32, "other"), KernelConfig("library")
    assert shortlist([A, B, C, other, another, library], 5) == [A, other, library, B, another]
    assert shortlist([A, B], None) == [A, B]


def test_a_kernel_that_the_model_does_not_know_is_last_and_does_not_push_out_the_spare() -> None:
    library = KernelConfig("library")
    facts = {A: FakeFacts(spills=1), B: FakeFacts(), library: FakeFacts()}
    seconds = {A: 3.0, B: 2.0, library: math.inf}

    def order_of(*configs: KernelConfig) -> list[KernelConfig]:
        found, _ = ranked(PROBLEM, configs, SM90, lambda p, c, a: facts[c], lambda p, c, a, f: seconds[c])
        return [one.config for one in found]

    assert order_of(library, A, B) == [B, library]
    assert order_of(library, A) == [A, library]


def test_what_does_not_compile_is_out_and_if_nothing_does_the_compiler_is_quoted() -> None:
    def facts_of(problem: object, config: KernelConfig, arch: object) -> FakeFacts:
        if config != B:
            raise RuntimeError("out of resource\nand much more")
        return FakeFacts()

    order, dropped = ranked(PROBLEM, [A, B], SM90, facts_of, lambda p, c, a, f: 1.0)
    assert [one.config for one in order] == [B]
    assert [(out.config, out.reason) for out in dropped] == [(A, "it does not compile: RuntimeError: out of resource")]
    with pytest.raises(RuntimeError, match="out of resource"):
        ranked(PROBLEM, [A], SM90, facts_of, lambda p, c, a, f: 1.0)


@pytest.mark.parametrize("size", [1, 3, 64, 1152, 4096, 4608, 14336, 12289, 2**20])
def test_sizes_that_compile_alike_have_the_same_powers_of_two(size: int) -> None:
    k = alike(dataclasses.replace(PROBLEM, k=size)).k
    assert k == size or (size > 4096 and 4096 <= k < 8192)
    assert all((k % 2**power == 0) == (size % 2**power == 0) for power in range(13))


def test_where_all_are_out_the_heuristic_stays() -> None:
    order, dropped = ranked(PROBLEM, [A, B], SM90, lambda p, c, a: FakeFacts(spills=1), lambda p, c, a, f: 1.0)
    assert [one.config for one in order] == [A]
    assert [out.config for out in dropped] == [B]
