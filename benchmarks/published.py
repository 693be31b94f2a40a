"""Published timings of products of matrices beside what the model of time says of them.

python -m benchmarks.published

The rows are in `published_timings.json`: those found that name GPU, shape and figure, of kernels that are as fast as
their authors could make them. Timed by calls, a row stands there only if it takes twice as long as the least that the
same source shows: else it is the time of a call. A row with a note is where a figure of `Board` comes from.

The model is asked about a plain kernel as libraries have them, and as a library would, it takes the best tile. Facts of
such a kernel are not compiled but counted: the matrix instructions that a tile needs, the loads of both operands, and
the loop's own few instructions. Nothing is decoded or scaled in the loop, but for float8 in blocks, where sums are
multiplied with a scale and added up in float32 every 128 columns.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.target import Arch, KernelConfig, Problem, arch_named
from fxquant.tuning.facts.record import Facts, HotLoop, LaunchFacts
from fxquant.tuning.model import Modelled, modelled_time

ROWS = Path(__file__).with_name("published_timings.json")
# What modelled over published times are within; see `docs/gpu-model.md` for who is at the ends.
BAND = (0.65, 1.25)

# Tiles [rows, columns] and warps that libraries choose from; and parts that K is split into.
TILES = (
    (256, 256, 8), (128, 256, 8), (256, 128, 8), (128, 192, 8), (128, 128, 8), (128, 128, 4), (128, 64, 4),
    (64, 256, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4), (32, 64, 4),
)  # fmt: skip
SPLITS = (1, 2, 4, 8)
ROW_BYTES = 128  # of both operands in one iteration
LOOP_INSTRUCTIONS = 24  # of a warp: counters, waits, addresses
MOST_STAGES = 8
_FORMATS = {
    "float16": ("", ""),
    "int8": ("int8/channel", "int8/token"),
    "float8": ("float8_e4m3fn/channel", "float8_e4m3fn/token"),
    "float8 blocks": ("float8_e4m3fn/block128x128", "float8_e4m3fn/group128"),
    "mxfp8": ("mxfp8", "mxfp8"),
}


@dataclass(frozen=True)
class Comparison:
    """One row, and the model's time for it; both in seconds."""

    row: Mapping[str, Any]
    published: float
    modelled: float
    model: Modelled
    config: KernelConfig

    @property
    def ratio(self) -> float:
        return self.modelled / self.published

    @property
    def independent(self) -> bool:
        """No figure of the model comes from this row."""
        return "note" not in self.row


def comparisons() -> list[Comparison]:
    """All rows."""
    return [_compared(row) for row in json.loads(ROWS.read_text(encoding="utf-8"))]


def _compared(row: Mapping[str, Any]) -> Comparison:
    m, n, k = row["m"], row["n"], row["k"]
    published = row["published"] / 1e6 if row["unit"] == "us" else 2 * m * n * k / (row["published"] * 1e12)
    model, config = best_plain(row["format"], m, n, k, arch_named(row["arch"]))
    return Comparison(row, published, model.kernel if row["timed"] == "kernel" else model.seconds, model, config)


def plain_problem(form: str, m: int, n: int, k: int) -> Problem:
    """A linear on one of the formats 'float16', 'int8', 'float8', 'float8 blocks', 'mxfp8', with half results."""
    weights, activations = _FORMATS[form]
    return Problem("linear", m, n, k, weights, activations, "float16" if form == "float16" else "bfloat16")


def best_plain(form: str, m: int, n: int, k: int, arch: Arch) -> tuple[Modelled, KernelConfig]:
    """The fastest of all plain kernels by the model, as a library would choose."""
    problem = plain_problem(form, m, n, k)
    found: list[tuple[Modelled, KernelConfig]] = []
    for rows, columns, warps in TILES:
        for split in SPLITS:
            plain = Plain(form, rows, columns, warps, split, arch)
            if plain.registers <= arch.max_registers and plain.stages > 1:
                found.append((modelled_time(problem, plain.config, arch, plain.facts), plain.config))
    return min(found, key=lambda pair: pair[0].seconds)


@dataclass(frozen=True)
class Plain:
    """One plain kernel."""

    form: str
    rows: int
    columns: int
    warps: int
    split: int
    arch: Arch

    @property
    def width(self) -> int:
        return 2 if self.form == "float16" else 1

    @property
    def step(self) -> int:
        return ROW_BYTES // self.width

    @property
    def stages(self) -> int:
        held = (self.rows + self.columns) * ROW_BYTES
        return min(MOST_STAGES, self.arch.shared_per_block // held)

    @property
    def threads(self) -> int:
        return self.warps * self.arch.warp_size

    @property
    def registers(self) -> int:
        """Sums, twice of float8 in blocks; sm100 has them in tensor memory."""
        sums = self.rows * self.columns // self.threads
        held = 64 if self.arch.name == "sm100" else sums * (1 + (self.form == "float8 blocks" and self.warps == 4))
        return held + 40

    @property
    def config(self) -> KernelConfig:
        return KernelConfig.of(
            "plain", BLOCK_M=self.rows, BLOCK_N=self.columns, BLOCK_K=self.step, SPLIT_K=self.split, GROUP_M=8,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip

    @property
    def facts(self) -> Facts:
        held = (self.rows + self.columns) * ROW_BYTES * self.stages
        columns = min(512, self.columns) if self.arch.name == "sm100" else 0
        main = LaunchFacts("plain", self.registers, 0, held, self.warps, columns, {}, self.loop())
        more = LaunchFacts("sum", 32, 0, 0, 4, 0, {}, HotLoop(is_loop=True, total=8))
        return Facts((main,) if self.split == 1 else (main, more))

    def loop(self) -> HotLoop:
        operations = 2 * self.rows * self.columns * self.step
        by_block = self.form == "float8 blocks"
        promoted = self.rows * self.columns // self.threads if by_block else 0
        name, each = self._instruction()
        count = max(1, operations // each // self.warps)
        loop = HotLoop(is_loop=True, matrix={name: count}, operations=operations, floating=promoted)
        copies = (self.rows + self.columns) * ROW_BYTES // 16 // self.threads
        fragments = self._fragments()
        match self.arch.name:
            case "sm90" | "sm100":
                loop = dataclasses.replace(loop, bulk_copies=2)
                copies = fragments = 2
            case "gfx942":
                loop = dataclasses.replace(
                    loop, global_loads={16: copies}, shared_stores=copies, shared_loads=fragments
                )
            case _:
                loop = dataclasses.replace(loop, async_copies={16: copies}, matrix_loads=fragments)
        return dataclasses.replace(loop, total=count + promoted + copies + fragments + LOOP_INSTRUCTIONS)

    def _instruction(self) -> tuple[str, int]:
        """Name of the matrix instruction and its operations a warp."""
        k = 32 // self.width
        match self.arch.name:
            case "sm90":
                letter = {"float16": "H", "int8": "I"}.get(self.form, "Q")
                return f"{letter}GMMA.64x{self.columns}x{k}.F32", 2 * 64 * self.columns * k // 4
            case "sm100":
                return "UTCHMMA" if self.form == "float16" else "UTCQMMA", 2 * 128 * self.columns * k // self.warps
            case "gfx942":
                kind = "f16" if self.form == "float16" else "fp8_fp8"
                return f"v_mfma_f32_32x32x{k // 2}_{kind}", 2 * 32 * 32 * (k // 2)
            case _:
                letter = {"float16": "H", "int8": "I"}.get(self.form, "Q")
                return f"{letter}MMA.168{k}.F32", 2 * 16 * 8 * k

    def _fragments(self) -> int:
        """Loads of 16 bytes a thread by which a warp gets its share of both operands out of shared memory."""
        tall = 2 if self.warps == 8 or self.rows >= 64 else 1
        wide = self.warps // tall
        of_warp = (self.rows // tall + max(self.columns // wide, 8)) * ROW_BYTES
        return max(1, of_warp // (16 * self.arch.warp_size))


def main() -> int:
    for one in comparisons():
        row = one.row
        shape = f"{row['m']:5} x {row['n']:5} x {row['k']:5}"
        times = f"published {one.published * 1e6:8.1f} us  modelled {one.modelled * 1e6:8.1f} us  {one.ratio:.2f}"
        words = (
            f"{row['kernel']:20} {row['gpu']:10} {row['format']:13} {shape}",
            times,
            one.config,
            row.get("note", ""),
        )
        sys.stdout.write("  ".join(map(str, words)).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
