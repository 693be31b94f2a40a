"""`fxquant tune`: find the fastest configurations for a model or a file of problems, and keep or share them."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch import nn

from fxquant.errors import InvalidOption
from fxquant.target import Problem, Target
from fxquant.tuning import Outcome, PlanCache, Progress, TuneReport, caches_of, export_plans, import_plans
from fxquant.tuning.cpu import words_of
from fxquant.tuning.report import microseconds


def tune(
    model: Annotated[
        str | None,
        typer.Argument(help="PACKAGE.MODULE:FUNCTION; the function returns (model, example inputs)."),
    ] = None,
    shapes: Annotated[Path | None, typer.Option(help="A JSON list of problems, instead of a model.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="cpu, or an architecture: sm80, sm89, sm90, sm100, gfx942. By default where the model is; "
            "for shapes and plans the CPU."
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    preset: Annotated[str | None, typer.Option(help="What the model is quantized to.")] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Then write the device's plans to a file, for machines of its kind.")
    ] = None,
    given: Annotated[
        Path | None, typer.Option("--import", help="First take over plans that such a machine exported.")
    ] = None,
) -> None:
    """Measure configurations on this machine, or choose by the model of time for a GPU that is not here."""
    console = Console(stderr=True)
    if model and shapes:
        raise InvalidOption("--shapes", str(shapes), "it takes the place of MODEL; leave one of them out")
    if preset and not model:
        raise InvalidOption("--preset", preset, "it is for a MODEL; shapes say their formats themselves")
    if not (model or shapes or export or given):
        raise InvalidOption("MODEL", None, "give a model, --shapes, --export or --import")
    with _modules_beside_the_user():
        made = _made(model) if model else None
        where = target or (_place(made[0]) if made else "cpu")
        cache = caches_of(where)[0]
        if given:
            console.print(f"{_imported(cache, given)} plans of {given} taken over into {cache.path}", soft_wrap=True)
        if made or shapes:
            _show(_tuned(console, made, shapes, where, mode, preset))
    if export:
        console.print(f"{_exported(cache, export)} plans for {cache.device} written to {export}", soft_wrap=True)


Made = tuple[nn.Module, tuple[Any, ...]]


def _tuned(
    console: Console, made: Made | None, shapes: Path | None, target: str, mode: str, preset: str | None
) -> TuneReport:
    import fxquant

    with Bar(
        TextColumn("{task.description}", table_column=None),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("tuning", total=None, best="")

        def watch(progress: Progress) -> None:
            bar.update(task, total=progress.total, completed=progress.done, description=str(progress.problem))
            if progress.outcome is not None:
                bar.update(task, best=_best(progress.outcome))

        if made is None:
            assert shapes is not None
            return fxquant.tune(_problems(shapes), target=target, mode=mode, progress=watch)  # pyright: ignore[reportArgumentType]
        model, inputs = made
        return fxquant.tune(model, *inputs, config=preset, target=target, mode=mode, progress=watch)  # pyright: ignore[reportArgumentType]


def _exported(cache: PlanCache, file: Path) -> int:
    try:
        return export_plans(cache, file)
    except OSError as error:
        raise InvalidOption("--export", str(file), f"it cannot be written ({error})") from error


def _imported(cache: PlanCache, file: Path) -> int:
    try:
        return import_plans(cache, file)
    except OSError as error:
        raise InvalidOption("--import", str(file), f"{cache.path} cannot be written ({error})") from error


def _best(outcome: Outcome) -> str:
    entry = outcome.entry
    return f"{words_of(entry.config)} {microseconds(entry.seconds)}, {entry.gain:.2f} x the heuristic"


def _problems(file: Path) -> list[Problem]:
    from fxquant.tuning.problems import read_problems

    return read_problems(file)


@contextlib.contextmanager
def _modules_beside_the_user() -> Iterator[None]:
    """Modules of the current folder can be imported, as by python -m: also while the model is made and run."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _made(name: str) -> Made:
    """The model and its example inputs that a function makes, named as 'package.module:function'.

    What the function raises passes, with its traceback: that is the user's to read.
    """
    module, _, function = name.partition(":")
    wanted = "it takes PACKAGE.MODULE:FUNCTION, a function without arguments that returns (model, example inputs)"
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidOption("MODEL", name, f"{wanted} ({error})") from error
    made = make() if callable(make) else None
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise InvalidOption("MODEL", name, wanted)
    model, inputs = made
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _place(model: nn.Module) -> str:
    """The name of the target that a model is on."""
    first = next(model.parameters(), None)
    here = Target.of_this_machine("cpu" if first is None else first.device)
    return here.arch or here.device


def _show(report: TuneReport) -> None:
    table = Table("problem", "configuration", "time", "x heuristic", "source", box=SIMPLE)
    for outcome in report.outcomes:
        entry = outcome.entry
        source = entry.source + (" before" if outcome.known else "")
        row = (str(entry.problem), words_of(entry.config), microseconds(entry.seconds), f"{entry.gain:.2f}", source)
        table.add_row(*row)
    console = Console()
    console.print(table)
    for outcome in report.outcomes:
        for out in outcome.dropped:
            console.print(f"{outcome.entry.problem}: not {words_of(out.config)}: {out.reason}", soft_wrap=True)
    console.print(report.summary, soft_wrap=True)
