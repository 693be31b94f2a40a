"""Measure the models in every recipe, write the results, and renew the tables and the plot.

python -m benchmarks.accuracy [--quick] [--only MODEL ...] [--recipes GLOB ...] [--write docs]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks.accuracy import dit, document, efficientnet, minilm, smollm2
from benchmarks.accuracy.measure import Row, Settings, float_form, float_row, measured, plain_scores
from benchmarks.accuracy.recipes import Recipe, all_recipes
from benchmarks.accuracy.results import FOLDER, SUBJECTS, Results, save
from benchmarks.accuracy.subject import Forward, Outputs, Subject
from benchmarks.harness import machine, progress
from benchmarks.peers.absent import Absent

MAKE: dict[str, Callable[[bool], Subject]] = {
    "minilm": minilm.subject,
    "efficientnet": efficientnet.subject,
    "dit": dit.subject,
    "smollm2": smollm2.subject,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little data and few rounds: shows that it works")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="these models")
    parser.add_argument("--recipes", nargs="+", default=["*"], help="rows whose name matches one of these globs")
    parser.add_argument("--executor", choices=("eager", "inductor"), default="eager", help="what runs both sides")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each pair")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for the JSON files")
    parser.add_argument("--write", type=Path, help="a folder whose accuracy.md and accuracy.svg to renew")
    return parser.parse_args(arguments)


def chosen_recipes(subject: Subject, globs: list[str]) -> list[Recipe]:
    return [
        recipe
        for recipe in all_recipes()
        if any(fnmatchcase(recipe.name, glob) for glob in globs)
        and (subject.has_embeddings or not recipe.needs_embeddings)
        and subject.name in (recipe.only or subject.name)
    ]


def rows_of(subject: Subject, want: Outputs, recipes: list[Recipe], settings: Settings) -> Iterator[Row]:
    """Float, then each recipe; one that fails says so in its row, and the others still come."""
    plain: Forward = float_form(subject.model, settings)
    yield float_row(subject, want)
    for recipe in recipes:
        torch._dynamo.reset()  # graphs of the recipe before
        try:
            row = measured(subject, recipe, want, plain, settings)
        except Exception as error:  # a table with one gap is worth more than none after a quarter of an hour
            row = Row(recipe.name, recipe.family, error=f"{type(error).__name__}: {error}")
        progress(f"{subject.name}: {_words(row, subject)}")
        yield row


def _words(row: Row, subject: Subject) -> str:
    if row.error:
        return f"{row.recipe}: {row.error}"
    figures = ", ".join(f"{m.heading} {row.scores[m.key]:.{m.digits}f}" for m in subject.metrics)
    return f"{row.recipe}: {figures}, {row.speed:.2f}x float's speed ({row.took:.0f} s)"


def measure_subject(name: str, chosen: argparse.Namespace) -> Results:
    """Everything for one model."""
    started = time.perf_counter()
    progress(f"{name}: loading")
    subject = MAKE[name](chosen.quick)
    settings = Settings(chosen.executor, 0.1 if chosen.quick else chosen.seconds)
    want = subject.run(subject.model)
    rows = tuple(rows_of(subject, want, chosen_recipes(subject, chosen.recipes), settings))
    progress(f"{name}: plain round-to-nearest")
    return Results(
        name=subject.name,
        title=subject.title,
        source=subject.source,
        timed_as=subject.timed_as,
        metrics=subject.metrics,
        rows=rows,
        plain=plain_scores(subject, want),
        machine=machine(),
        threads=torch.get_num_threads(),
        executor=chosen.executor,
        date=time.strftime("%Y-%m-%d"),
        seconds=time.perf_counter() - started,
        quick=chosen.quick,
    )


def main(chosen: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is on disk
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    failed = []
    for name in chosen.only:
        try:
            results = measure_subject(name, chosen)
        except Absent as absent:
            sys.stdout.write(f"{name} is skipped: {absent}\n")
            continue
        sys.stdout.write(f"{document.section(results)}\n\nwritten to {save(results, chosen.results)}\n\n")
        sys.stdout.flush()
        failed += [f"{name} {row.recipe}" for row in results.rows if row.error]
    if chosen.write is not None:
        document.write(chosen.results, chosen.write)
    if failed:
        sys.stdout.write(f"no figures for: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(parse()))
