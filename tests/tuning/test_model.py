"""The model of time on a board whose figures are round, by hand; and its directions on real ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from benchmarks.published import BAND, Plain, best_plain, comparisons, plain_problem
from fxquant.target import ARCHS, Arch, Board, KernelConfig, Problem
from fxquant.tuning.facts.record import Facts, HotLoop, LaunchFacts
from fxquant.tuning.model import Modelled, modelled_time
from fxquant.tuning.model.iteration import iteration_of
from fxquant.tuning.model.tiling import tiling_of
from fxquant.tuning.model.traffic import memory_bytes
from fxquant.tuning.occupancy import Occupancy, occupancy_of

SM90 = ARCHS["sm90"]
# 10 processors at 1 GHz, each of 1024 operations a cycle of either unit; nothing but the loop takes time.
BOARD = Board(
    "round", 10, 1.0, 1e12, 10**6, 1e15,
    {"int8": 10 * 1024e9, "float16": 10 * 1024e9, "float32": 1e12},
    latency=0.0, launch=0.0,
)  # fmt: skip
ROUND = Arch("sm90", "cuda", 90, BOARD, shared=2**17, shared_per_block=2**17, round_trip=0, cache_rate=10**6)
INT8 = ("int8/channel", "int8/token")
TILE = 64


def problem(m: int, n: int, k: int) -> Problem:
    return Problem("linear", m, n, k, *INT8, "float16")


def config(**more: int) -> KernelConfig:
    return KernelConfig.of("some", BLOCK_M=TILE, BLOCK_N=TILE, BLOCK_K=64, GROUP_M=8, **more)


def facts(*, registers: int = 64, spills: int = 0, shared: int = 2**16, launches: int = 1, **loop: Any) -> Facts:
    """Of a block of 4 warps that makes a tile of 64 x 64 by int8 instructions of a warp group."""
    mix = {"matrix": {"IGMMA.64x64x32.S8.S8": 2}, "operations": 2 * TILE * TILE * 64, "bulk_copies": 2, **loop}
    main = LaunchFacts("f", registers, spills, shared, 4, 0, {}, HotLoop(is_loop=True, **mix))
    other = LaunchFacts("sum", 32, 0, 0, 4, 0, {}, HotLoop(is_loop=True, total=1))
    return Facts((main, *[other] * (launches - 1)))


def seconds(m: int, n: int, k: int, arch: Arch = ROUND, known: Facts | None = None, **more: int) -> float:
    return modelled_time(problem(m, n, k), config(**more), arch, known or facts()).seconds


def loop_seconds(m: int, n: int, k: int, **more: Any) -> float:
    """Without the last block's result: 64 * 64 * 2 bytes at 10**6 a cycle, and instructions that are computed here."""
    stored = TILE * TILE / 32 * 12 / 4 / 1e9
    return seconds(m, n, k, **more) - stored


def test_one_wave_of_products_by_hand() -> None:
    """20 tiles on 10 processors, 2 at once: 2 * 512 cycles an iteration, 16 iterations."""
    assert occupancy_of(ROUND, registers=64, shared=2**16 - 1024, warps=4).blocks == 2
    known = facts(shared=2**16 - 1024)
    assert loop_seconds(4 * TILE, 5 * TILE, 1024, known=known) == pytest.approx(2 * 512 * 16 / 1e9)


def test_waves_are_whole_steps() -> None:
    one, full, more = (loop_seconds(TILE, tiles * TILE, 4096) for tiles in (1, 10, 11))
    assert one == pytest.approx(full)
    assert more - full == pytest.approx(full + TILE * TILE / 32 * 12 / 4 / 1e9)  # the first wave's results too


def test_a_last_wave_shares_processors_less() -> None:
    """With room for 2 blocks each, 10 blocks go to 10 processors: they take half of what 20 do."""
    known = facts(shared=2**16 - 1024)
    assert loop_seconds(TILE, 10 * TILE, 4096, known=known) == pytest.approx(
        loop_seconds(2 * TILE, 10 * TILE, 4096, known=known) / 2
    )


def test_memory_by_hand() -> None:
    """A wide weight for one row: its bytes over the bandwidth."""
    arch = dataclasses.replace(ROUND, board=dataclasses.replace(BOARD, bandwidth=1e10))
    found = modelled_time(problem(1, 640, 4096), config(), arch, facts())
    moved = memory_bytes(problem(1, 640, 4096), tiling_of(problem(1, 640, 4096), config()), 10**6, held=10)
    assert found.bound_by == "memory"
    assert moved == pytest.approx(4096 + 4 + 640 * 4096 + 640 * 4 + 640 * 2 + 640 * 2)
    assert found.seconds == pytest.approx(moved / 1e10, rel=0.01)


def test_operands_beyond_the_cache_are_read_again() -> None:
    """16 x 16 tiles, 10 at once. The cache holds x and weight, or neither: then each wave reads its own."""
    p = problem(16 * TILE, 16 * TILE, 1000)
    tiling = tiling_of(p, config())
    once = memory_bytes(p, tiling, 2**30, held=10)
    again = memory_bytes(p, tiling, 2**10, held=10)
    waves, x_tile, w_tile = 26, TILE * (1000 + 4), TILE * (1000 + 4)
    rest = once - 32 * x_tile
    assert again == pytest.approx(waves * (8 * x_tile + 2 * w_tile) + rest)


def test_instructions_bound() -> None:
    """4 warps of 4000 instructions, 4 started in a cycle: 4000 cycles an iteration, matrix units 512."""
    busy = facts(total=4000)
    found = modelled_time(problem(TILE, 10 * TILE, 640), config(), ROUND, busy)
    assert found.bound_by == "instructions"
    assert loop_seconds(TILE, 10 * TILE, 640, known=busy) == pytest.approx(4000 * 10 / 1e9)


def test_arithmetic_has_fewer_lanes_than_warps_have_threads() -> None:
    """1000 integer instructions of 128 threads in 64 lanes: 2000 cycles."""
    assert loop_seconds(TILE, 10 * TILE, 640, known=facts(total=1000, integer=1000)) == pytest.approx(2000 * 10 / 1e9)


def test_shared_memory_bound() -> None:
    """64 loads of 16 bytes by 128 threads, at 128 bytes a cycle, and both tiles written once."""
    found = facts(matrix_loads=64)
    cycles = (64 * 16 * 128 + 128 * 64 * (1 + 4 / 640)) / 128
    assert loop_seconds(TILE, 10 * TILE, 640, known=found) == pytest.approx(cycles * 10 / 1e9)


def test_latency_bounds_what_is_under_way() -> None:
    """One iteration's loads under way for a microsecond: an iteration takes that long, however fast the memory is."""
    slow = dataclasses.replace(ROUND, board=dataclasses.replace(BOARD, latency=1e-6))
    found = modelled_time(problem(TILE, 10 * TILE, 6400), config(), slow, facts(shared=2**13))
    assert found.bound_by == "latency"
    assert found.kernel == pytest.approx(100 * 1e-6 + 1e-6, rel=0.05)


def test_launches_cost_and_split_products_take_two() -> None:
    board = dataclasses.replace(BOARD, latency=1e-6, launch=3e-6)
    arch = dataclasses.replace(ROUND, board=board)
    one = modelled_time(problem(1, 64, 64), config(), arch, facts())
    two = modelled_time(problem(1, 64, 64), config(), arch, facts(launches=2))
    assert one.seconds - one.kernel == pytest.approx(3e-6)
    assert two.seconds - one.seconds == pytest.approx(4e-6)
    assert two.reason == "launch"


def test_reasons_for_what_is_beyond_the_roofline() -> None:
    masked = modelled_time(problem(1, 640, 4096), config(), ROUND, facts())
    assert masked.bound_by == "matrix"
    assert masked.reason == "tiles"
    idle = modelled_time(problem(TILE, 11 * TILE, 65536), config(), ROUND, facts())
    assert idle.reason == "waves"
    busy = modelled_time(problem(TILE, 10 * TILE, 65536), config(), ROUND, facts(total=4000))
    assert busy.reason == "mix"
    assert sum(busy.lost.values()) == pytest.approx(busy.seconds - busy.roofline.attainable)


def _decoding(m: int, n: int, slab: int, instructions: int = 1) -> Modelled:
    """int4 in groups of 32 with scales of 4 bytes, written out as halves: 0.5 + 4 / 32 bytes read, 2 written."""
    decode = LaunchFacts("decode", 32, 0, 0, 4, 0, {}, HotLoop(is_loop=False, total=instructions))
    product = dataclasses.replace(facts().main, function="product")
    whole = Problem("linear", m, n, 1024, "int4/group32", "", "float16")
    return modelled_time(whole, config(SLAB=slab), ROUND, Facts((decode, product)))


def test_a_weight_that_is_decoded_apart_costs_its_bytes_and_the_plain_product() -> None:
    plain = Problem("linear", 640, 512, 1024, "", "", "float16")
    product = modelled_time(plain, config(), ROUND, facts()).seconds
    decoded = 512 * 1024 * (0.5 + 4 / 32 + 2) / 1e12
    assert _decoding(640, 512, 512).seconds == pytest.approx(decoded + product)
    assert _decoding(640, 1024, 512).seconds == pytest.approx(2 * (decoded + product))
    # 8 blocks of 64 rows by 8 chunks of 128 columns, 4 warps each, 4 instructions a cycle, 10 processors
    slow = _decoding(640, 512, 512, instructions=10**6)
    assert slow.seconds == pytest.approx(64 * 10**6 / 10 / 1e9 + product)
    assert slow.reason == "decoding"


def test_decoding_apart_counts_less_for_more_rows() -> None:
    few, many = (_decoding(m, 512, 512) for m in (640, 6400))
    for one in (few, many):
        assert sum(one.lost.values()) == pytest.approx(one.seconds - one.roofline.attainable)
    assert many.lost["decoding"] == pytest.approx(few.lost["decoding"])
    assert many.ratio < few.ratio


def test_split_k_fills_idle_processors() -> None:
    whole = modelled_time(problem(1, 64, 65536), config(), ROUND, facts())
    split = modelled_time(problem(1, 64, 65536), config(SPLIT_K=8), ROUND, facts(launches=2))
    assert split.seconds < whole.seconds / 6


def test_occupancy() -> None:
    assert occupancy_of(SM90, registers=255, shared=0, warps=8) == Occupancy(1, "registers")
    assert occupancy_of(SM90, registers=32, shared=100 * 1024, warps=4) == Occupancy(2, "shared memory")
    assert occupancy_of(SM90, registers=16, shared=0, warps=32) == Occupancy(2, "threads")
    assert occupancy_of(SM90, registers=16, shared=0, warps=1) == Occupancy(32, "blocks")
    assert occupancy_of(ARCHS["sm100"], registers=32, shared=0, warps=4, tensor_memory=256).blocks == 2
    assert occupancy_of(SM90, registers=300, shared=0, warps=1) == Occupancy(0, "registers")
    assert occupancy_of(SM90, registers=32, shared=228 * 1024, warps=4) == Occupancy(0, "shared memory")


def test_what_no_processor_holds_takes_forever() -> None:
    found = modelled_time(problem(1, 64, 64), config(), ROUND, facts(shared=2**18))
    assert found.seconds == math.inf
    assert found.bound_by == "occupancy"


def test_spilled_registers_cost() -> None:
    """They go to the cache and back in every iteration."""
    arch = dataclasses.replace(ROUND, cache_rate=64)
    assert seconds(TILE, 10 * TILE, 6400, arch, facts(local=192, spills=192)) > 1.5 * seconds(
        TILE, 10 * TILE, 6400, arch, facts()
    )


def test_an_unrolled_loop_counts_in_parts() -> None:
    """Twice the instructions for twice the columns: the time of the loop that is not unrolled."""
    copies = {16: 4}  # 16 bytes by 128 threads, 4 times: both tiles of 64 columns
    plain = facts(total=4000, async_copies=copies, bulk_copies=0)
    twice = facts(
        total=8000, async_copies={16: 8}, bulk_copies=0, operations=4 * TILE * TILE * 64,
        matrix={"IGMMA.64x64x32.S8.S8": 4},
    )  # fmt: skip
    assert seconds(TILE, 640, 6400, known=twice) == pytest.approx(seconds(TILE, 640, 6400, known=plain))


@pytest.mark.parametrize(("n", "cycles"), [(8, 18), (16, 20), (32, 24), (64, 32), (128, 64), (256, 128)])
def test_wgmma_takes_the_cycles_that_were_published(n: int, cycles: int) -> None:
    """Luo et al., arXiv:2501.12084, table 9: latency of m64nNk16 with both operands in shared memory."""
    loop = HotLoop(is_loop=True, matrix={f"HGMMA.64x{n}x16.F32": 1}, operations=2 * 64 * n * 16, bulk_copies=2)
    launch = LaunchFacts("f", 64, 0, 2**14, 4, 0, {}, loop)
    p = Problem("linear", 64, n, 4096, "", "", "float16")
    tiling = tiling_of(p, KernelConfig.of("f", BLOCK_M=64, BLOCK_N=n, BLOCK_K=16))
    assert iteration_of(launch, tiling, SM90).cycles["matrix"] == pytest.approx(cycles, rel=1e-3)


def test_a_warp_alone_reaches_less_of_hoppers_peak() -> None:
    loop = HotLoop(is_loop=True, matrix={"HMMA.16816.F32": 1}, operations=10**6, bulk_copies=2)
    tiling = tiling_of(plain_problem("float16", 64, 64, 64), config())
    cycles = iteration_of(LaunchFacts("f", 64, 0, 0, 4, 0, {}, loop), tiling, SM90).cycles["matrix"]
    assert cycles == pytest.approx(10**6 / 4096 / 0.629, rel=1e-3)


PAIRS = [
    (name, form)
    for name, arch in ARCHS.items()
    for form in ("float16", "int8", "float8")
    if form != "float8" or arch.float8
]


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_more_work_takes_no_less_time_and_none_beats_the_roofline(name: str, form: str) -> None:
    arch = ARCHS[name]

    def best(m: int, n: int, k: int) -> Modelled:
        found, _ = best_plain(form, m, n, k, arch)
        assert found.seconds >= found.roofline.attainable >= found.roofline.seconds
        assert found.kernel <= found.seconds
        return found

    for base in ((1, 4096, 4096), (512, 3072, 3072), (4096, 4096, 4096)):
        start = best(*base).seconds
        for axis in range(3):
            larger = list(base)
            larger[axis] *= 2
            assert best(*larger).seconds >= start * 0.999


def test_bigger_tiles_of_one_kernel_need_fewer_bytes() -> None:
    """At many rows a narrow tile is bound by the cache where a wide one is bound by its products."""
    p = plain_problem("int8", 8192, 8192, 8192)
    wide, narrow = (Plain("int8", rows, 128, 4, 1, ARCHS["sm80"]) for rows in (128, 32))
    times = [modelled_time(p, one.config, ARCHS["sm80"], one.facts).seconds for one in (wide, narrow)]
    assert times[0] < times[1]


def test_published_timings_are_within_the_band() -> None:
    rows = comparisons()
    independent = [one for one in rows if one.independent]
    assert len({one.row["source"] for one in independent}) >= 5
    for one in rows:
        assert BAND[0] <= one.ratio <= BAND[1], (one.row, one.ratio)
    mean = math.exp(sum(math.log(one.ratio) for one in independent) / len(independent))
    assert 0.8 < mean < 1.0
