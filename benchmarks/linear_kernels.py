"""The CPU linear kernels against eager float32 and oneDNN's u8 kernel: again and again, in turns, in one process.

    python -m benchmarks.linear_kernels [--json FILE] [--seconds 0.4] [--threads 1 2] [--sizes 384 1024 4096]

Each cell checks the answers before it times them. `onednn` has the same per-token quantization in front of it, and the
scaling behind it, that int8dq does inside; `onednn bare` is its product alone. Ends with 1 if a floor does not hold; a
cell that misses one is timed once more, four times as long, and that second time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import Stats, paired, ratio
from fxquant import cpu_kernels, ops

ROWS = (1, 4, 16, 64, 256, 1024)
ODD_ROWS = (1, 16, 256)
SIZES = (384, 1024, 4096)
# What must hold of int8dq at 4096 x 4096: times as fast as eager float32, by rows.
FLOAT_FLOORS = {1: 3.0, 16: 5.0, 256: 2.2}
ONEDNN_FLOORS = {256: 0.8}
ODD_CEILING = 1.3  # time per operation of an odd size, against that of the next multiple of 64


@dataclass(frozen=True)
class Case:
    """One linear, N = K = size, in all its forms. Shapes: codes and weight [N, K], scale [N, 1], x [rows, K]."""

    size: int
    rows: int
    x: Tensor
    codes: Tensor
    scale: Tensor
    weight: Tensor
    packed: Tensor


@dataclass(frozen=True)
class Cell:
    """The times of one case, and which floors it missed."""

    threads: int
    size: int
    rows: int
    stats: dict[str, Stats]
    missed: list[str] = field(default_factory=list)

    def gops(self, name: str) -> float:
        return 2e-9 * self.rows * self.size * self.size / self.stats[name].median

    def line(self) -> str:
        times = " ".join(f"{self.stats[name].median * 1e3:10.4f}" for name in self.stats)
        ratios = f"{ratio(self.stats, 'float', 'int8dq'):8.2f} {ratio(self.stats, 'float', 'int8wo'):8.2f}"
        if "onednn" in self.stats:
            ratios += f" {ratio(self.stats, 'onednn', 'int8dq'):8.2f} {ratio(self.stats, 'onednn bare', 'int8dq'):8.2f}"
        return f"{self.threads:2d} {self.size:5d} {self.rows:5d} {times} {self.gops('int8dq'):7.0f} {ratios}"


def make_case(size: int, rows: int) -> Case:
    generator = torch.Generator().manual_seed(size + rows)
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8, generator=generator)
    scale = torch.rand(size, 1, generator=generator) * 1e-3 + 1e-4
    x = torch.randn(rows, size, generator=generator)
    return Case(size, rows, x, codes, scale, codes.float() * scale, torch.ops.fxquant.int8_pack(codes))


def candidates(case: Case) -> dict[str, Callable[[], Tensor]]:
    dynamic = torch.ops.fxquant.int8_linear_dynamic.default
    weight_only = torch.ops.fxquant.int8_linear_weight_only.default
    x, packed, scale, size = case.x, case.packed, case.scale, case.size
    fns: dict[str, Callable[[], Tensor]] = {
        "float": lambda: F.linear(x, case.weight),
        "int8dq": lambda: dynamic(x, packed, scale, None, size),
        "int8wo": lambda: weight_only(x, packed, scale, None, size),
    }
    if torch.cpu.get_capabilities().get("avx512_vnni"):  # without VNNI oneDNN's product is a reference loop
        fns |= onednn(case)
    return fns


def onednn(case: Case) -> dict[str, Callable[[], Tensor]]:
    weight = torch.ops.onednn.qlinear_prepack(case.codes, None)
    zero_points = torch.zeros(case.size, dtype=torch.int32)
    scale = case.scale.flatten()
    product = torch.ops.onednn.qlinear_pointwise.default
    quantize = torch.ops.fxquant.int8_quantize_per_token.default

    def bare(u8: Tensor) -> Tensor:
        return product(u8, 1.0, 128, weight, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], "")

    def whole() -> Tensor:
        codes, x_scale = quantize(case.x)
        return bare(codes.view(torch.uint8).bitwise_xor_(128)).mul_(x_scale)

    fixed = quantize(case.x)[0].view(torch.uint8).bitwise_xor(128)
    return {"onednn": whole, "onednn bare": lambda: bare(fixed)}


def check_answers(case: Case, fns: dict[str, Callable[[], Tensor]]) -> None:
    """Every candidate computes what it should: int8dq the reference's bits, the others the float answer."""
    want = ops.reference.int8_linear_dynamic(case.x, case.packed, case.scale, None, case.size)
    if not torch.equal(fns["int8dq"](), want):
        raise SystemExit(f"int8dq is wrong at {case.rows} x {case.size}: not the reference's bits")
    exact = case.x.double() @ case.weight.double().t()
    unit = 2.0**-24
    bound = 2 * case.size * unit * (case.x.double().abs() @ case.weight.double().abs().t())
    for name in ("float", "int8wo"):  # weight = codes * scale was rounded too: twice gamma_K
        if not ((fns[name]() - exact).abs() <= bound).all():
            raise SystemExit(f"{name} is wrong at {case.rows} x {case.size}: beyond the bound of a float32 sum")
    if "onednn" in fns and not torch.allclose(fns["onednn"](), want, rtol=8 * unit, atol=0.0):
        raise SystemExit(f"onednn is wrong at {case.rows} x {case.size}: it computes something else")


def missed_floors(cell: Cell) -> list[str]:
    """What does not hold, judged by medians on one thread and by the best rounds on several.

    Where a neighbour holds one of the cores, a barrier of two threads waits for a whole time slice. That strikes most
    rounds alike, whoever computes, and says nothing about a kernel.
    """
    stats = cell.stats
    figure = "median" if cell.threads == 1 else "best"
    floors = [(name, "float", 1.0) for name in ("int8dq", "int8wo")]
    if cell.size == 4096:
        floors += [("int8dq", "float", FLOAT_FLOORS[cell.rows])] if cell.rows in FLOAT_FLOORS else []
        floors += [("int8dq", "onednn", ONEDNN_FLOORS[cell.rows])] if cell.rows in ONEDNN_FLOORS else []
    where = f"{cell.threads} threads, {cell.rows} x {cell.size}"
    ratios = [(ratio(stats, slow, fast, figure), fast, slow, floor) for fast, slow, floor in floors if slow in stats]
    return [
        f"{where}: {fast} is {met:.2f} times as fast as {slow} by the {figure}, must be {floor}"
        for met, fast, slow, floor in ratios
        if met < floor
    ]


def measure(case: Case, threads: int, seconds: float) -> Cell:
    fns = candidates(case)
    check_answers(case, fns)
    cell = Cell(threads, case.size, case.rows, {})
    for patience in (1, 4):
        stats = paired(fns, seconds=patience * seconds)
        cell = Cell(threads, case.size, case.rows, stats)
        if not missed_floors(cell):
            break
    return Cell(threads, case.size, case.rows, cell.stats, missed_floors(cell))


def grid(sizes: list[int], threads: int, seconds: float) -> Iterator[Cell]:
    for size in sizes:
        for rows in ROWS:
            yield measure(make_case(size, rows), threads, seconds)


@dataclass(frozen=True)
class OddSize:
    """An odd size against the next multiple of 64: how much longer one operation takes, for both kernels."""

    size: int
    even: int
    rows: int
    dynamic: float
    weight_only: float

    @property
    def missed(self) -> list[str]:
        named = {"int8dq": self.dynamic, "int8wo": self.weight_only}
        return [
            f"{self.rows} x {self.size}: {name} takes {cost:.2f} times as long per operation as at {self.even}"
            for name, cost in named.items()
            if cost > ODD_CEILING
        ]

    def line(self) -> str:
        return f"{self.rows:5d} x {self.size:4d} / {self.even:4d} {self.dynamic:8.2f} {self.weight_only:8.2f}"


def odd_sizes(sizes: list[int], seconds: float) -> Iterator[OddSize]:
    for size in (s - 27 for s in sizes):  # 357, 997, 4069
        even = (size + 63) // 64 * 64
        for rows in ODD_ROWS:
            odd, full = (make_case(s, rows) for s in (size, even))
            fns = {f"odd {name}": fn for name, fn in candidates(odd).items() if name.startswith("int8")}
            fns |= {f"even {name}": fn for name, fn in candidates(full).items() if name.startswith("int8")}
            per_operation = even * even / (size * size)
            for patience in (1, 4):
                stats = paired(fns, seconds=patience * seconds)
                costs = [ratio(stats, f"odd {n}", f"even {n}") * per_operation for n in ("int8dq", "int8wo")]
                found = OddSize(size, even, rows, *costs)
                if not found.missed:
                    break
            yield found


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU linear kernels against float32 and oneDNN, in pairs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, default=0.4, help="time per cell")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options = parser.parse_args()
    library = cpu_kernels.load()
    if library is None:
        raise SystemExit("there are no kernels to measure")

    print(f"kernels: {library.isa}; torch {torch.__version__}; load average {os.getloadavg()[0]:.1f}; times in ms")
    cells: list[Cell] = []
    odd: list[OddSize] = []
    with torch.inference_mode():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for cell in grid(options.sizes, threads, options.seconds):
                if not cells:
                    names = " ".join(f"{name:>10s}" for name in cell.stats)
                    print(f" T   N=K     M {names}    GOPS float/dq float/wo  dnn/dq bare/dq")
                cells.append(cell)
                print(cell.line(), flush=True)
        torch.set_num_threads(1)
        print("time per operation, odd size / next multiple of 64, one thread:   int8dq   int8wo")
        for found in odd_sizes(options.sizes, options.seconds):
            odd.append(found)
            print(found.line(), flush=True)

    missed = [words for row in [*cells, *odd] for words in row.missed]
    if options.json:
        options.json.write_text(json.dumps(as_json(library.isa, cells, odd, missed), indent=1) + "\n")
    for words in missed:
        print(f"MISSED  {words}")
    print("every floor holds" if not missed else f"{len(missed)} floors were missed")
    return 1 if missed else 0


def as_json(isa: str, cells: list[Cell], odd: list[OddSize], missed: list[str]) -> dict[str, object]:
    rows = [
        {
            "threads": cell.threads,
            "size": cell.size,
            "rows": cell.rows,
            "gops": {name: cell.gops(name) for name in cell.stats},
            "seconds": {name: stats.as_json() for name, stats in cell.stats.items()},
        }
        for cell in cells
    ]
    per_operation = [vars(found) for found in odd]
    return {"isa": isa, "torch": torch.__version__, "cells": rows, "odd_sizes": per_operation, "missed": missed}


if __name__ == "__main__":
    sys.exit(main())
