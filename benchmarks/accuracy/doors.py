"""The model door beside the compile door on the three models, and calibrated beside dynamic int8.

python -m benchmarks.accuracy.doors [--quick] [--only MODEL ...] [--write docs]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxquant
from benchmarks.accuracy import dit, efficientnet, minilm
from benchmarks.accuracy.document import MARK, PAGE
from benchmarks.accuracy.results import FOLDER
from benchmarks.accuracy.subject import Outputs, Subject
from benchmarks.harness import machine, progress
from benchmarks.table import markdown
from demo.view import put_between

MAKE: dict[str, Callable[[bool], Subject]] = {
    "minilm": minilm.subject,
    "efficientnet": efficientnet.subject,
    "dit": dit.subject,
}
RECIPES = ("int8wo", "int8dq", "int4wo", "fp8dq", "mxfp4")
OBSERVERS = ("absmax", "minmax", "percentile", "mse")
DYNAMIC = "int8dq"


def register_modules() -> None:
    """EfficientNet's package pads in a forward of its own: what a user would write for it."""
    from efficientnet_lite_pytorch.utils import Conv2dStaticSamePadding

    from fxquant.nn import QConv2d

    @fxquant.register_module(Conv2dStaticSamePadding)
    class QPadded(QConv2d, Conv2dStaticSamePadding):  # pyright: ignore[reportIncompatibleVariableOverride]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.static_padding(x))


def compiled_scores(subject: Subject, recipe: str, want: Outputs) -> dict[str, float]:
    torch._dynamo.reset()
    model = fxquant.compile(subject.model, recipe, executor="eager", dynamic=False)
    return subject.score(subject.run(model), want)


def frozen_scores(subject: Subject, recipe: str, want: Outputs) -> dict[str, float]:
    model = copy.deepcopy(subject.model)
    fxquant.quantize(model, recipe)
    fxquant.freeze(model)
    return subject.score(subject.run(model), want)


def calibrated_scores(subject: Subject, observer: str, want: Outputs) -> dict[str, float]:
    """int8 weights and static int8 activations, calibrated on the batch that is timed elsewhere."""
    model = copy.deepcopy(subject.model)
    fxquant.quantize(model, weights="int8", activations="int8")
    with torch.no_grad(), fxquant.Calibration(observer=observer):
        model(*subject.timed)
    fxquant.freeze(model)
    return subject.score(subject.run(model), want)


def measure(name: str, quick: bool) -> dict[str, Any]:
    progress(f"{name}: loading")
    subject = MAKE[name](quick)
    want = subject.run(subject.model)
    rows = []
    for recipe in RECIPES[:2] if quick else RECIPES:
        progress(f"{name}: {recipe} by both doors")
        both = {"compile": compiled_scores(subject, recipe, want), "model": frozen_scores(subject, recipe, want)}
        rows.append({"recipe": recipe, "scores": both})
    for observer in OBSERVERS[:1] if quick else OBSERVERS:
        progress(f"{name}: calibrated with {observer}")
        rows.append(
            {"recipe": f"int8 static, {observer}", "scores": {"model": calibrated_scores(subject, observer, want)}}
        )
    metrics = [[metric.key, metric.heading, metric.digits] for metric in subject.metrics]
    return {
        "name": name,
        "title": subject.title,
        "metrics": metrics,
        "rows": rows,
        "machine": machine(),
        "quick": quick,
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One table for each model: a line a recipe, both doors in each cell."""
    parts = []
    for one in results:
        lines = [list(_cells(row, one["metrics"])) for row in one["rows"]]
        headings = ["recipe", *(heading for _, heading, _ in one["metrics"])]
        parts.append(f"**{one['title']}**\n\n{markdown(headings, lines)}")
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, Any], metrics: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"`{row['recipe']}`"
    for key, _, digits in metrics:
        values = [f"{scores[key]:.{digits}f}" for scores in row["scores"].values()]
        yield " / ".join(values)


def disagreements(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the doors differ by more than a unit of the last digit shown, in words."""
    found = []
    for one in results:
        for row in one["rows"]:
            for key, heading, digits in one["metrics"]:
                values = [scores[key] for scores in row["scores"].values()]
                if max(values) - min(values) > 1.001 * 10.0**-digits:
                    found.append(f"{one['name']} {row['recipe']} {heading}: {values}")
    return found


def main(chosen: argparse.Namespace) -> int:
    register_modules()
    results = [measure(name, chosen.quick) for name in chosen.only]
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / "doors.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(results))
    if chosen.write is not None:
        page = chosen.write / PAGE
        page.write_text(
            put_between(page.read_text(encoding="utf-8"), f"{MARK}-doors", table(results)), encoding="utf-8"
        )
    differing = disagreements(results)
    sys.stdout.write("".join(f"the doors differ: {line}\n" for line in differing))
    return 1 if differing else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data and few recipes: shows that it works")
    parser.add_argument("--only", nargs="+", choices=list(MAKE), default=list(MAKE), help="these models")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for doors.json")
    parser.add_argument("--write", type=Path, help="a folder whose accuracy.md to renew")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
