"""One row: a recipe's quality, size and speed on one model."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

import fxquant
from benchmarks.accuracy.control import rounded
from benchmarks.accuracy.recipes import FLOAT, Recipe
from benchmarks.accuracy.references import REFERENCES
from benchmarks.accuracy.subject import Forward, Outputs, Subject
from benchmarks.timing import Stats, paired
from fxquant.report import ModelReport, Site


@dataclass(frozen=True)
class Size:
    """Bytes of weights: of the quantized sites in float and as they are now, and of the whole model in float."""

    before: int
    after: int
    model: int

    @property
    def model_after(self) -> int:
        return self.model - self.before + self.after


@dataclass(frozen=True)
class Row:
    """What one recipe came to. ``kernels`` counts sites by kernel, ``worst`` is the site of the lowest SQNR in dB.

    ``seconds``: median time of one call, "float" and "quantized", taken in turns. ``error``: why there is no figure.
    """

    recipe: str
    family: str
    spec: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    size: Size | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    left_float: int = 0
    worst: tuple[str, float] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    took: float = 0.0
    error: str = ""

    @property
    def speed(self) -> float | None:
        """How many times as fast as float."""
        return self.seconds["float"] / self.seconds["quantized"] if self.seconds else None


@dataclass(frozen=True)
class Settings:
    """`executor` is the option of that name; float runs on the same. `seconds`: how long a pair is timed."""

    executor: str = "eager"
    seconds: float = 1.0


def float_form(model: nn.Module, settings: Settings) -> Forward:
    """The float model that quantized ones are timed beside."""
    return model if settings.executor == "eager" else torch.compile(model, dynamic=False, fullgraph=True)


def float_row(subject: Subject, want: Outputs) -> Row:
    whole = sum(parameter.nbytes for parameter in subject.model.parameters())
    return Row(FLOAT, "float", scores=subject.score(want, want), size=Size(0, 0, whole))


def measured(subject: Subject, recipe: Recipe, want: Outputs, plain: Forward, settings: Settings) -> Row:
    """Quality on the whole task, then time. Raises what fxquant raises."""
    if subject.is_frozen:
        return frozen(subject, recipe, want, plain, settings)
    started = time.perf_counter()
    kept = {} if subject.exclude is None else {"exclude": subject.exclude}
    options = {**kept, **recipe.options, "executor": settings.executor, "numerics": True}
    model = fxquant.compile(subject.model, dynamic=False, fullgraph=True, **options)
    scores = subject.score(subject.run(model), want)
    report = model.report()
    sites = quantized_sites(report)
    stats = _timed(subject, plain, model, settings)
    return Row(
        recipe=recipe.name,
        family=recipe.family,
        spec=", ".join(dict.fromkeys(site.spec_text for site in sites)),
        scores=scores,
        size=size_of(subject.model, sites),
        kernels=kernels_of(sites),
        left_float=sum(site.members for site in report.graphs[0].sites if not site.is_quantized),
        worst=worst_of(report),
        seconds={name: one.median for name, one in stats.items()},
        took=time.perf_counter() - started,
    )


def frozen(subject: Subject, recipe: Recipe, want: Outputs, plain: Forward, settings: Settings) -> Row:
    """The same through the model door, in plain eager. It does not say which site is worst."""
    started = time.perf_counter()
    model = copy.deepcopy(subject.model)
    kept = {} if subject.exclude is None else {"exclude": subject.exclude}
    report = fxquant.quantize(model, **{**kept, **recipe.options})
    fxquant.freeze(model)
    scores = subject.score(subject.run(model), want)
    before, after = (sum(getattr(row, name) for row in report.quantized) for name in ("bytes_before", "bytes_after"))
    stats = _timed(subject, plain, model, settings)
    return Row(
        recipe=recipe.name,
        family=recipe.family,
        spec=", ".join(dict.fromkeys(str(row.spec) for row in report.quantized)),
        scores=scores,
        size=Size(before, after, sum(parameter.nbytes for parameter in subject.model.parameters())),
        left_float=len(report.skipped),
        seconds={name: one.median for name, one in stats.items()},
        took=time.perf_counter() - started,
    )


@torch.no_grad()
def _timed(subject: Subject, plain: Forward, model: Forward, settings: Settings) -> dict[str, Stats]:
    candidates = {"float": lambda: plain(*subject.timed), "quantized": lambda: model(*subject.timed)}
    return paired(candidates, seconds=settings.seconds, min_rounds=5)


def quantized_sites(report: ModelReport) -> list[Site]:
    """The quantized sites of the first graph (the others are the same model for other shapes), each weight once."""
    seen: set[str] = set()
    found = []
    for site in report.graphs[0].sites:
        if site.is_quantized and not seen.issuperset(site.parameter_names):
            seen.update(site.parameter_names)
            found.append(site)
    return found


def size_of(model: nn.Module, sites: list[Site]) -> Size:
    before, after = (sum(getattr(site, name) for site in sites) for name in ("bytes_before", "bytes_after"))
    return Size(before, after, sum(parameter.nbytes for parameter in model.parameters()))


def kernels_of(sites: list[Site]) -> dict[str, int]:
    """Sites by the kernel that runs them; those without one under their status."""
    found: Counter[str] = Counter()
    for site in sites:
        found[site.kernel or site.status] += site.members
    return dict(found)


def worst_of(report: ModelReport) -> tuple[str, float] | None:
    """The site whose output is farthest from the float model's, on the first batch of each graph."""
    known = [(site.path, site.sqnr) for site in report.sites if site.sqnr is not None]
    return min(known, key=lambda one: one[1], default=None)


def plain_scores(subject: Subject, want: Outputs) -> dict[str, dict[str, float]]:
    """The scores of plain round-to-nearest, by the scheme of `REFERENCES`."""
    found = {}
    for reference in REFERENCES:
        if reference.plain is not None:
            found[reference.scheme] = subject.score(
                subject.run(rounded(subject.model, reference.plain, subject.exclude)), want
            )
    return found
