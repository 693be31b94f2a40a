"""The shipped tables: for each architecture the configurations that the model of time finds best, for `LINEARS`.

python -m benchmarks.make_tables [--arch NAME ...] [--preset NAME ...] [--candidates N] [--minutes N] [--verbose]

For each preset, size and bucket of rows: of the kernels' candidates that neither spill registers nor pass the shared
memory the one with the least modelled time; warps of their own for loads are left to measuring. What compiling says of
a candidate depends on its format and hardly on sizes, or on the number of parts of K: one problem of each format, in
two parts, stands for all, and only a choice is compiled again if its size or its parts make other code of it.
Compiled facts are kept in the user's cache, so that a second run goes on where the first one ended; `--minutes` ends
one early, and what was not compiled by then is not chosen. bfloat16 is compiled; float16 takes its choices. Tables of
several architectures can be made by as many runs at once. Afterwards: python -m benchmarks.gpu_model_page

Facts of what was chosen on sm90 are written to `gpu_model_facts.json` too: `docs/gpu-model.md` is made of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.shapes import LINEARS
from fxquant import PRESETS
from fxquant.target import ARCHS, M_BUCKETS, Arch, KernelConfig, Problem
from fxquant.tuning.candidates import TritonSpace
from fxquant.tuning.facts import Facts, facts_of
from fxquant.tuning.model import modelled_time
from fxquant.tuning.plans.records import Entry
from fxquant.tuning.plans.tables import table_path, write_table
from fxquant.tuning.pruning import why_drop

FACTS = Path(__file__).with_name("gpu_model_facts.json")
FACTS_OF = "sm90"
DTYPE, OTHER_DTYPE = "bfloat16", "float16"
STANDS_FOR_ALL = 4096  # rows and columns of the weight for which candidates are compiled

logger = logging.getLogger(__name__)


@dataclass
class Chooser:
    """Chooses configurations on one architecture until `deadline` (of time.monotonic)."""

    arch: Arch
    deadline: float
    most: int
    known: dict[tuple[Problem, KernelConfig], Facts | None] = field(default_factory=dict)
    compiled: int = 0

    def best(self, problem: Problem) -> tuple[Entry, Facts] | None:
        """The best candidate for a problem of a bucket, and its facts; None if none could be compiled."""
        space = TritonSpace(self.arch)
        candidates = [config for config in space.candidates(problem) if not config.meta.get("SPECIALIZE")]
        timed: list[tuple[float, KernelConfig]] = []
        for config in self._tried(candidates):
            facts = self.facts(standing_for(problem, config), unsplit(config))
            if facts is not None and not why_drop(facts, self.arch):
                timed.append((modelled_time(problem, config, self.arch, facts).seconds, config))
        heuristic = next((seconds for seconds, config in timed if config == candidates[0]), None)
        for seconds, config in sorted(timed, key=lambda pair: pair[0]):
            facts = self.facts(like(problem, config), config)
            if facts is not None and not why_drop(facts, self.arch):
                source = space.kernel_source(config.kernel)
                return Entry(problem, config, "modelled", source, seconds, heuristic or seconds), facts
        return None

    def _tried(self, candidates: Sequence[KernelConfig]) -> Iterator[KernelConfig]:
        """Of each kernel so many as are looked at, best guesses first."""
        for _, of_kernel in itertools.groupby(candidates, key=lambda config: config.kernel):
            yield from itertools.islice(of_kernel, self.most)

    def facts(self, problem: Problem, config: KernelConfig) -> Facts | None:
        """Facts, from the cache or by compiling; None if it does not compile, or time is up."""
        key = problem, config
        if key not in self.known:
            if time.monotonic() > self.deadline:
                return None
            logger.info("%s  %s  %s", self.arch, config, problem)
            try:
                self.known[key] = facts_of(problem, config, self.arch)
            except Exception as error:  # Triton's compiler fails in many ways: such a candidate is not chosen
                logger.warning("%s on %s for %s does not compile: %s", config, self.arch, problem, type(error).__name__)
                self.known[key] = None
            self.compiled += 1
        return self.known[key]


def standing_for(problem: Problem, config: KernelConfig) -> Problem:
    """The problem that is compiled for all sizes of its formats. A kernel without BLOCK_M is written out for the rows
    that there are: it has them."""
    m = STANDS_FOR_ALL if "BLOCK_M" in config.meta else problem.m
    return dataclasses.replace(problem, m=m, n=STANDS_FOR_ALL, k=STANDS_FOR_ALL)


def unsplit(config: KernelConfig) -> KernelConfig:
    """The configuration that is compiled for all splits of K: the number of parts hardly changes the code."""
    values = tuple((name, min(value, 2) if name == "SPLIT_K" else value) for name, value in config.values)
    return KernelConfig(config.kernel, values)


def like(problem: Problem, config: KernelConfig) -> Problem:
    """A problem that is compiled to the same code: launchers and Triton look at whether sizes are 1, or multiples of
    16, and K of a block's or a chunk's columns."""
    step = max(256, config.meta.get("BLOCK_K", 1))
    k = STANDS_FOR_ALL if problem.k % step == 0 else problem.k
    n = STANDS_FOR_ALL if problem.n % 16 == 0 else problem.n
    m = _rows_like(problem.m) if "BLOCK_M" in config.meta else problem.m
    return dataclasses.replace(problem, m=m, n=n, k=k)


def _rows_like(m: int) -> int:
    return 1 if m == 1 else 8 if m < 16 else 16


def sizes() -> list[tuple[int, int]]:
    return sorted({(linear.n, linear.k) for linear in LINEARS})


def problems_of(preset: str) -> Iterator[Problem]:
    """Each size of `LINEARS` in a preset's formats, at each bucket of rows."""
    spec = PRESETS[preset]
    for n, k in sizes():
        for m in M_BUCKETS:
            yield Problem("linear", m, n, k, str(spec.weights), str(spec.activations or ""), DTYPE)


def make(arch: Arch, presets: Sequence[str], chooser: Chooser) -> tuple[list[Entry], dict[str, Facts]]:
    """All entries of an architecture, and the facts of what they chose by format and configuration."""
    entries: list[Entry] = []
    chosen: dict[str, Facts] = {}
    for preset in presets:
        started, before = time.monotonic(), chooser.compiled
        for problem in problems_of(preset):
            found = chooser.best(problem)
            if found is not None:
                entry, facts = found
                entries += [entry, dataclasses.replace(entry, problem=dataclasses.replace(problem, dtype=OTHER_DTYPE))]
                chosen.setdefault(facts_key(problem, entry.config), facts)
        line = f"{arch}  {preset:10}  {len(entries)} entries, {chooser.compiled - before} candidates, "
        sys.stdout.write(f"{line}{time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()
    return entries, chosen


def facts_key(problem: Problem, config: KernelConfig) -> str:
    """What `gpu_model_facts.json` keeps facts by."""
    return f"{problem.activations or problem.dtype} × {problem.weights}: {json.dumps(config.to_json())}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=sorted(ARCHS), default=["sm90", "sm80", "sm89", "sm100", "gfx942"])
    parser.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=list(PRESETS))
    parser.add_argument(
        "--candidates", type=int, default=100, help="at most so many of each kernel, best guesses first"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="compile no longer than this, for all together")
    parser.add_argument("--verbose", action="store_true", help="say what is compiled, with the time of day")
    chosen = parser.parse_args(arguments)
    level = logging.INFO if chosen.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    deadline = time.monotonic() + 60 * chosen.minutes
    for name in chosen.arch:
        arch = ARCHS[name]
        entries, facts = make(arch, chosen.preset, Chooser(arch, deadline, chosen.candidates))
        path = write_table(name, entries)
        sys.stdout.write(f"{path}: {len(entries)} entries, {path.stat().st_size // 1024} KiB\n")
        if name == FACTS_OF:
            kept = {key: found.to_json() for key, found in sorted(facts.items())}
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
            FACTS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

__all__ = ["FACTS", "Chooser", "facts_key", "main", "make", "problems_of", "table_path"]
