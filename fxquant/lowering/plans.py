"""Which Triton kernels run a site on a target, and how they are named in notes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fxquant.graphs import value_of
from fxquant.lowering.site import QuantizedSite
from fxquant.numerics import MAX_IN_FEATURES, fits_panels
from fxquant.spec import TensorSpec
from fxquant.target import M_BUCKETS, Plan, Problem, Target, arch_named
from fxquant.tuning.plans.lookup import lookup


@dataclass(frozen=True)
class Choice:
    """The plan for a problem: as the op takes it, and in words."""

    ints: tuple[int, ...]
    words: str


def problem_of(site: QuantizedSite, activations: TensorSpec | None) -> Problem:
    """A linear site as a problem of any number of rows; `activations`: of the codes that the kernel reads, if any."""
    weight = site.weight
    sizes = (0, weight.out_features, weight.in_features)
    return Problem("linear", *sizes, str(weight.spec), str(activations or ""), dtype_word(site.dtype))


def dtype_word(dtype: torch.dtype) -> str:
    """As a problem has it: 'float16'."""
    return str(dtype).removeprefix("torch.")


def no_tiles(site: QuantizedSite) -> str:
    """The weight has no tile form, or is too wide for the kernels."""
    weight = site.weight
    if weight.in_features > MAX_IN_FEATURES:
        return f"in_features is {weight.in_features}: above {MAX_IN_FEATURES} a column's sum of codes may overflow"
    if not fits_panels(weight.spec):
        return f"the weight is scaled per {weight.spec.granularity}, tiles have scales of rows or pieces of rows"
    return ""


@functools.lru_cache(maxsize=1024)
def no_triton_kernel(problem: Problem, arch: str) -> str:
    """Empty if for any number of rows there is a kernel that takes the problem; else what each says."""
    from fxquant.triton_kernels import KERNELS, kernels_for

    target = arch_named(arch)
    missing = next((m for m in M_BUCKETS if not kernels_for(problem.with_m(m), target)), None)
    if missing is None:
        return ""
    of_m = problem.with_m(missing)
    words = (f"{k.name}: {k.why_not(of_m, target)}" for k in KERNELS.values() if k.op == problem.op)
    return f"on {arch} no kernel takes {problem.activations or 'float'} x with {problem.weights} ({'; '.join(words)})"


def chosen(problem: Problem, target: Target, site: QuantizedSite | None = None) -> Choice:
    """The plan of the target's tables, and the configuration that the site's number of rows gets; the largest, if that
    is not known before the call."""
    return choice_of(lookup(problem, target), _rows(site) or M_BUCKETS[-1], target)


def choice_of(plan: Plan, m: int, target: Target) -> Choice:
    """A plan, in words by what it gives m rows."""
    row = plan.row(m)
    others = len(plan.rows) - 1
    by_rows = f", {others} more by rows" if others else ""
    return Choice(tuple(plan.to_ints()), f"{row.config} ({row.source} {target.arch}{by_rows})")


def _rows(site: QuantizedSite | None) -> int | None:
    """How many rows x has; None if that is symbolic."""
    if site is None:
        return None
    sizes = value_of(site.x).shape[:-1]
    return sizes.numel() if all(isinstance(size, int) for size in sizes) else None


__all__ = ["Choice", "Plan", "choice_of", "chosen", "dtype_word", "no_tiles", "no_triton_kernel", "problem_of"]
