"""Run the cells of a model and set them beside what is published.

python -m benchmarks.gpu_recipes --model black-forest-labs/FLUX.1-dev [--gpu H100] [--recipe int8dq ...] [--batch 1 ...]
python -m benchmarks.gpu_recipes --tiny

Without --recipe and --batch the cells are those of the published tables. --tiny runs small random pipelines on the CPU:
it shows that the script works, and its figures mean nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from benchmarks.gpu_recipes.measuring import Effort, Measured, measure
from benchmarks.gpu_recipes.pipelines import Setting
from benchmarks.gpu_recipes.published import FLOAT_DTYPES, Cell, Published, cells_of, published
from benchmarks.harness import Outcome, arguments, finish, progress
from benchmarks.table import markdown
from fxquant.errors import FxQuantError

FLUX, COGVIDEOX = "black-forest-labs/FLUX.1-dev", "THUDM/CogVideoX-5b"
EMPTY = "–"


def parser() -> argparse.ArgumentParser:
    made = arguments(__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--model", action="append", help=f"a pipeline's id at Hugging Face; default {FLUX}")
    made.add_argument("--recipe", action="append", help="only these, by our names or the tables'")
    made.add_argument("--batch", action="append", type=int, help="only these")
    made.add_argument("--device", default="", help="default: cuda, with --tiny cpu")
    made.add_argument("--gpu", default="", help="whose published figures stand beside ours: H100 or A100")
    made.add_argument("--steps", type=int, help="denoising steps; default: the pipeline's")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--warm-up", type=int, default=2)
    made.add_argument("--mode", default="max-autotune", help="of Inductor; not with --tiny")
    made.add_argument("--executor", choices=("inductor", "eager"), help="what runs compiled graphs")
    made.add_argument("--tiny", action="store_true", help="small random pipelines instead of the real ones")
    return made


def chosen_cells(chosen: argparse.Namespace, rows: tuple[Published, ...], model: str, gpu: str) -> tuple[Cell, ...]:
    """The published cells, less what the command line leaves out; recipes that no table has are added."""
    cells = cells_of(rows, model, gpu)
    if chosen.recipe:
        known = {cell.recipe for cell in cells}
        added = [Cell(model, batch, True, True, False, name) for name in chosen.recipe for batch in chosen.batch or [1]]
        cells = (*cells, *(cell for cell in added if cell.recipe not in known))
    return tuple(
        cell
        for cell in cells
        if (not chosen.recipe or cell.recipe in chosen.recipe) and (not chosen.batch or cell.batch in chosen.batch)
    )


def tiny_cells(model: str, rows: tuple[Published, ...], recipes: list[str] | None) -> tuple[Cell, ...]:
    """Every recipe of the tables once, compiled and fused; float and one recipe in eager too."""
    named = dict.fromkeys(row.cell.recipe for row in rows if row.cell.model == model)
    wanted = [recipe for recipe in named if not recipes or recipe in recipes]
    compiled = [Cell(model, recipe=recipe, fuse=True, compile=True) for recipe in wanted]
    eager = [Cell(model, recipe=recipe) for recipe in wanted if recipe in ("None", "bf16", "int8wo")]
    return (*eager, *compiled)


def effort_of(cell: Cell, chosen: argparse.Namespace) -> Effort:
    """On a GPU as asked. Of the tiny pipelines one recipe is compiled by Inductor, which takes a while, others run as
    graphs in eager."""
    if not chosen.tiny:
        return Effort(chosen.warm_up, chosen.rounds, chosen.mode, chosen.executor or "inductor")
    executor = "inductor" if cell.recipe == "int8dq" and cell.model == FLUX else "eager"
    return Effort(1, 1, None, chosen.executor or executor)


def attempt(cell: Cell, setting: Setting, effort: Effort) -> tuple[Measured | None, str]:
    """What was measured, or why nothing was."""
    if cell.why_not:
        return None, cell.why_not
    try:
        return measure(cell, setting, effort), ""
    except (FxQuantError, torch.OutOfMemoryError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def gpu_name(chosen: argparse.Namespace) -> str:
    """Whose figures to show: as asked, else this machine's, else those of an H100."""
    if chosen.gpu:
        return chosen.gpu
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((known for known in ("H100", "A100") if known in name), "H100")


def add_row(outcome: Outcome, cell: Cell, theirs: Published | None, ours: Measured | None, why: str, err: str) -> None:
    """One row: the cell, what is published of it, what was measured or why nothing was."""
    shown = (None, None, None) if theirs is None else (theirs.model_memory, theirs.inference_memory, theirs.seconds)
    mine = (None, None, None) if ours is None else (ours.model_memory, ours.inference_memory, ours.seconds)
    names = ("model GiB", "inference GiB", "seconds")
    row = {
        "model": cell.model.rpartition("/")[2],
        "recipe": cell.recipe,
        "batch": str(cell.batch),
        **{name: "yes" if getattr(cell, name) else "no" for name in ("fuse", "compile", "compile_vae")},
        **{f"torchao {name}": _figure(value) for name, value in zip(names, shown, strict=True)},
        **{f"fxquant {name}": _figure(value) for name, value in zip(names, mine, strict=True)},
        "their time / ours": f"{shown[2] / mine[2]:.2f}" if shown[2] and mine[2] else EMPTY,
        "rel. error": err,
        "note": why or ("" if ours is None else ours.quantized),
    }
    figures = {
        "cell": dataclasses.asdict(cell),
        "torchao": dict(zip(names, shown, strict=True)),
        "fxquant": dict(zip(names, mine, strict=True)),
        "why_not": why,
    }
    outcome.add(row, **figures)


def _figure(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.4g}"


def run(chosen: argparse.Namespace) -> Outcome:
    """Measure all cells; one that fails is noted and the others go on."""
    rows, gpu = published(), gpu_name(chosen)
    title = "Diffusion pipelines by recipe, beside diffusers-torchao"
    outcome = Outcome("gpu_recipes", f"{title}{'; tiny random pipelines, whose figures mean nothing' * chosen.tiny}")
    setting = Setting(chosen.device or ("cpu" if chosen.tiny else "cuda"), chosen.steps, chosen.tiny)
    for model in chosen.model or [FLUX, *[COGVIDEOX] * chosen.tiny]:
        cells = tiny_cells(model, rows, chosen.recipe) if chosen.tiny else chosen_cells(chosen, rows, model, gpu)
        floats: dict[int, Measured] = {}
        for cell in sorted(cells, key=lambda cell: cell.recipe not in FLOAT_DTYPES):
            progress(str(cell))
            theirs = next((row for row in rows if row.cell == cell and row.gpu == gpu and not chosen.tiny), None)
            ours, why = attempt(cell, setting, effort_of(cell, chosen))
            if ours is not None:
                floats.setdefault(cell.batch, ours)
            error = EMPTY if ours is None else f"{ours.error_to(floats[cell.batch]).relative:.3f}"
            add_row(outcome, cell, theirs, ours, why, error)
    return outcome


def write_markdown(outcome: Outcome, folder: Path) -> Path:
    """The table as a page, beside the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{outcome.name}.md"
    table = markdown(list(outcome.rows[0]), [list(row.values()) for row in outcome.rows])
    path.write_text(f"# {outcome.title}\n\n{table}\n", encoding="utf-8")
    return path


def main(words: list[str] | None = None) -> int:
    chosen = parser().parse_args(words)
    outcome = run(chosen)
    if not outcome.rows:
        progress(f"no published cells of {chosen.model}: name some by --recipe")
        return 2
    status = finish(outcome, chosen)
    progress(f"written to {write_markdown(outcome, chosen.results)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
