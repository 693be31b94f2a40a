"""docs/gpu-model.md: the model of time, its sources, what was published beside it, and the shipped choices by it.

python -m benchmarks.gpu_model_page

Made of `published_timings.json`, the shipped table of sm90 and `gpu_model_facts.json`; nothing is compiled.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.make_tables import DTYPE, FACTS, FACTS_OF, facts_key
from benchmarks.published import BAND, comparisons
from benchmarks.shapes import BATCHES, LINEARS, Linear
from fxquant import PRESETS
from fxquant.target import ARCHS, Problem, bucket_of
from fxquant.tuning.facts.record import Facts
from fxquant.tuning.model import Modelled, modelled_time
from fxquant.tuning.plans.tables import read_table

PAGE = Path(__file__).parent.parent / "docs" / "gpu-model.md"
TEXT = Path(__file__).with_name("gpu_model_text.md")
DEMAND = {"compute": 1.25, "memory": 1.2}
LETTERS = {
    "launch": "L", "waves": "W", "tiles": "T", "cache": "C", "instructions": "I", "shared memory": "S",
    "latency": "D", "matrix": "M", "memory": "B", "decoding": "A",
}  # fmt: skip
REASONS = {
    "L": "gaps between launches, the first load, the last store, and summing up split products",
    "W": "waves: processors idle in the last one",
    "T": "tiles: rows and columns beyond the problem",
    "A": "decoding apart: the weight is written out in a half type before it is multiplied",
    "C": "mix: the cache's bandwidth, because the tile that fits is too small to reuse what it loads",
    "I": "mix: instructions outside the matrix units, such as decoding",
    "S": "mix: shared memory",
    "D": "mix: latency, because too few bytes are under way",
    "M": "mix: matrix instructions that do not reach the peak",
    "B": "mix: bytes read from memory more than once",
}


@dataclass(frozen=True)
class Figure:
    """What the model says of a linear in a preset with its shipped configuration."""

    linear: Linear
    preset: str
    problem: Problem
    model: Modelled

    @property
    def demand(self) -> float:
        return DEMAND[self.model.roofline.bound_by]

    @property
    def met(self) -> bool:
        return self.model.ratio <= self.demand

    @property
    def letter(self) -> str:
        reason = self.model.reason
        return LETTERS[self.model.bound_by if reason == "mix" else reason]

    @property
    def text(self) -> str:
        return f"{self.model.ratio:.2f}" + ("" if self.met else f" {self.letter}")


@functools.cache
def figures() -> tuple[Figure, ...]:
    """All linears at both batches in all presets that the table has; a shape that two linears share once."""
    return tuple(_figures())


def _figures() -> Iterator[Figure]:
    table, facts = read_table(FACTS_OF), _facts()
    for preset, spec in PRESETS.items():
        seen: set[Problem] = set()
        for linear in LINEARS:
            for batch in BATCHES:
                formats = str(spec.weights), str(spec.activations or "")
                problem = Problem("linear", linear.rows(batch), linear.n, linear.k, *formats, DTYPE).without_steps()
                entry = table.get(problem.with_m(bucket_of(problem.m)))
                found = entry and facts.get(facts_key(problem, entry.config))
                if entry and found and problem not in seen:
                    seen.add(problem)
                    yield Figure(linear, preset, problem, modelled_time(problem, entry.config, ARCHS[FACTS_OF], found))


def _facts() -> dict[str, Facts]:
    if not FACTS.exists():
        return {}
    kept = json.loads(FACTS.read_text(encoding="utf-8"))
    return {key: Facts.from_json(launches) for key, launches in kept.items()}


def page() -> str:
    """The whole page."""
    text = TEXT.read_text(encoding="utf-8")
    parts = {"boards": _boards(), "published": _published(), "band": _band(), "summary": _summary()}
    parts |= {"reasons": _reasons(), "shapes": _shapes()}
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _boards() -> str:
    rows = []
    for arch in ARCHS.values():
        board = arch.board
        units = ", ".join(
            f"{unit} {rate / 1e12:g}" + (f" × {board.sustained[unit]:g}" if unit in board.sustained else "")
            for unit, rate in board.operations.items()
        )
        rows.append(
            (arch, board.name, f"{board.processors} × {board.clock:g} GHz", units,
             f"{board.bandwidth / 1e12:g} × {board.attainable:g}", f"{board.cache >> 20} MiB, "
             f"{board.cache_bandwidth / 1e12:g} TB/s", f"{board.latency * 1e9:.0f} ns", f"{board.launch * 1e6:g} us")
        )  # fmt: skip
    head = ("target", "board", "processors", "Top/s, × kept up", "TB/s, × attained", "cache", "latency", "launch")
    return _table(head, rows)


def _published() -> str:
    rows = []
    for one in comparisons():
        row = one.row
        shape = f"{row['m']} × {row['n']} × {row['k']}"
        times = f"{one.published * 1e6:.1f}", f"{one.modelled * 1e6:.1f}", f"{one.ratio:.2f}"
        source = f"[{row['source'].removeprefix('https://').partition('/blob')[0]}]({row['source']})"
        mark = "" if one.independent else " ¹"
        rows.append((row["gpu"], f"{row['kernel']}{mark}", row["format"], shape, *times, source))
    return _table(("GPU", "kernel", "format", "m × n × k", "published us", "modelled us", "ratio", "source"), rows)


def _band() -> str:
    ratios = [one.ratio for one in comparisons() if one.independent]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    sources = len({one.row["source"] for one in comparisons() if one.independent})
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, geometric mean {mean:.2f}"
    return (
        f"{len(ratios)} timings from {sources} sources that no figure of the model comes from: modelled over published "
        f"is {spread}. `tests/tuning/test_model.py` holds all rows to {BAND[0]} to {BAND[1]}."
    )


def _summary() -> str:
    rows = []
    for preset in dict.fromkeys(one.preset for one in figures()):
        for bound in DEMAND:
            of = [one for one in figures() if one.preset == preset and one.model.roofline.bound_by == bound]
            if of:
                met = sum(one.met for one in of)
                ratios = sorted(one.model.ratio for one in of)
                sheet = sum(one.model.seconds <= DEMAND[bound] * one.model.roofline.seconds for one in of)
                missed = Counter(one.letter for one in of if not one.met)
                why = ", ".join(f"{letter} {count}" for letter, count in missed.most_common())
                middle = f"{ratios[len(ratios) // 2]:.2f}"
                rows.append((preset, bound, f"{met} of {len(of)}", middle, f"{ratios[-1]:.2f}", why, sheet))
    head = ("preset", "bound by", "meet the demand", "median ratio", "worst", "why not", "by data sheet")
    return _table(head, rows)


def _reasons() -> str:
    return _table(("letter", "most of the time beyond the roofline goes to"), REASONS.items())


def _shapes() -> str:
    presets = list(dict.fromkeys(one.preset for one in figures()))
    by_shape: dict[tuple[int, int, int], dict[str, Figure]] = {}
    for one in figures():
        by_shape.setdefault((one.problem.m, one.problem.n, one.problem.k), {})[one.preset] = one
    rows = []
    for (m, n, k), found in by_shape.items():
        linear = next(iter(found.values())).linear
        cells = (found[preset].text if preset in found else "" for preset in presets)
        rows.append((f"{linear.model} {linear.name}", f"{m} × {n} × {k}", *cells))
    return _table(("linear", "m × n × k", *presets), rows)


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    missed = sum(not one.met for one in figures())
    sys.stdout.write(f"{PAGE}: {len(figures())} figures, {missed} beyond the demand\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
