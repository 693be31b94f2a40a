"""docs/diffusers.md: small pipelines of random weights, compiled in each recipe: their pictures beside the float ones.

python -m benchmarks.pipelines [--write docs/diffusers.md] [--only sd3 flux ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import fxquant
from benchmarks.harness import Error, Outcome, arguments, finish, progress
from benchmarks.table import markdown, write
from fxquant.integrations import diffusers_compile
from tests.integrations.small_pipelines import made, main_part, picture

TITLES = {
    "pixart_sigma": "PixArt-Sigma",
    "sd3": "Stable Diffusion 3",
    "auraflow": "AuraFlow",
    "flux": "Flux",
    "cogvideox": "CogVideoX",
    "sd": "Stable Diffusion (UNet)",
    "sdxl": "Stable Diffusion XL (UNet)",
}
# dB of a picture to the float one: the least of the seven pipelines, less 4.
LEAST_SQNR = {
    "int8wo": 40.0,
    "int8dq": 24.0,
    "int4wo": 17.0,
    "int4dq": 16.0,
    "fp8wo": 25.0,
    "fp8dq": 18.0,
    "fp8dqrow": 18.0,
    "fp6_e3m2": 19.0,
    "fp5_e2m2": 19.0,
    "fp4_e2m1": 13.0,
}
RECIPES = tuple(LEAST_SQNR)
LEAST_COVERAGE = 0.95
MARK = "pipelines"


@dataclass(frozen=True)
class Pictured:
    """A pipeline compiled in one recipe, all of its models, and called once.

    sqnr      of its picture or video to the float one, in dB.
    coverage  the share of the transformer's or the UNet's numbers that is quantized, 0 to 1.
    graphs    by model: how many its call made.
    """

    sqnr: float
    coverage: float
    graphs: dict[str, int]


def measure(name: str, recipes: Iterable[str] = RECIPES, executor: str = "eager") -> dict[str, Pictured]:
    """The pipeline of that name in each recipe. A model that breaks its graph raises, as ``fullgraph=True`` says."""
    wanted = picture(made(name), name)
    found = {}
    for recipe in recipes:
        torch._dynamo.reset()
        pipe = fxquant.compile_pipeline(made(name), recipe, fullgraph=True, executor=executor)
        sqnr = Error.of(picture(pipe, name), wanted).sqnr
        reports = diffusers_compile.reports(pipe)
        graphs = {part: len(report.graphs) for part, report in reports.items()}
        found[recipe] = Pictured(sqnr, reports[main_part(pipe)[0]].coverage or 0.0, graphs)
    return found


def judge(outcome: Outcome, title: str, found: dict[str, Pictured]) -> None:
    """What holds for a pipeline in all recipes."""
    counts = sorted({count for one in found.values() for count in one.graphs.values()})
    outcome.demand(f"{title}: graphs of each model", counts == [1], ", ".join(map(str, counts)), "1")
    covered = min(one.coverage for one in found.values())
    outcome.demand(f"{title}: quantized", covered >= LEAST_COVERAGE, f"{covered:.1%}", f">= {LEAST_COVERAGE:.0%}")
    for recipe, one in found.items():
        least = LEAST_SQNR[recipe]
        outcome.demand(f"{title}, {recipe}: SQNR", one.sqnr >= least, f"{one.sqnr:.1f} dB", f">= {least:g} dB")


def main(chosen: argparse.Namespace) -> int:
    outcome = Outcome("pipelines", "Small pipelines of random weights: SQNR of the picture in dB by recipe")
    recipes = RECIPES[:2] if chosen.quick else RECIPES
    for name in chosen.only:
        progress(name)
        found = measure(name, recipes, chosen.executor)
        outcome.add(
            {"": TITLES[name], **{recipe: f"{one.sqnr:.1f}" for recipe, one in found.items()}},
            sqnr={recipe: one.sqnr for recipe, one in found.items()},
        )
        judge(outcome, TITLES[name], found)
    if chosen.write:
        headings = ["", *(f"`{recipe}`" for recipe in recipes)]
        write(chosen.write, MARK, markdown(headings, [list(one.values()) for one in outcome.rows]))
    return finish(outcome, chosen)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES), help="these pipelines")
    parser.add_argument("--executor", choices=("eager", "inductor"), default="eager", help="inductor: half an hour")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    sys.exit(main(parser.parse_args()))
