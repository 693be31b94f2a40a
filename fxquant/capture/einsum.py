"""Reading an einsum equation as one plain product of an activation with a matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

_SUBSCRIPTS = re.compile(r"[A-Za-z]|\.\.\.")


@dataclass(frozen=True)
class EinsumPlan:
    """How `einsum(equation, x, w)` is a linear.

    ``x.permute(x_order)`` has its ``contracted`` indices last; ``w.permute(weight_order).reshape(matrix)`` is [N, K];
    the product's last axis is unflattened into sizes ``made``, and ``output_order`` permutes that to the output.
    """

    x_order: list[int]
    contracted: int
    weight_order: list[int]
    matrix: tuple[int, int]
    made: list[int]
    output_order: list[int]


def plan_einsum(equation: str, x_shape: Sequence[Any], w_shape: Sequence[int], *, swapped: bool) -> EinsumPlan | str:
    """The plan, or why there is none. `swapped`: the weight is the equation's first operand."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return "an einsum of other than two operands"
    x_term, w_term = reversed(terms) if swapped else terms
    if "..." in w_term:
        return "an einsum with an ellipsis in the weight"
    x, w = _indices(x_term, len(x_shape)), _indices(w_term, len(w_shape))
    if len(x) != len(x_shape) or len(w) != len(w_shape) or len(set(x)) < len(x) or len(set(w)) < len(w):
        return "an einsum with a repeated index"
    output = _with_ellipsis(right, [i for i in x if len(i) > 1]) if arrow else _implicit_output(x, w)
    contracted = [i for i in w if i in x and i not in output]
    kept = [i for i in x if i not in contracted]
    made = [i for i in w if i not in contracted]
    if any(i in x for i in made):
        return "a batched einsum: not quantized by this version"
    if not contracted or not made or sorted(kept + made) != sorted(output):
        return "an einsum that is no plain product with a matrix"
    contracted = [i for i in x if i in contracted]  # in the activation's order, which costs it no copy
    sizes = dict(zip(w, w_shape, strict=True))
    x_sizes = dict(zip(x, x_shape, strict=True))
    if any(not isinstance(x_sizes[i], int) or x_sizes[i] != sizes[i] for i in contracted):
        return "an einsum that broadcasts, or sums over an index of unknown size"
    result = kept + made
    return EinsumPlan(
        x_order=[x.index(i) for i in kept + contracted],
        contracted=len(contracted),
        weight_order=[w.index(i) for i in made + contracted],
        matrix=(prod(sizes[i] for i in made), prod(sizes[i] for i in contracted)),
        made=[sizes[i] for i in made],
        output_order=[result.index(i) for i in output],
    )


def _indices(term: str, rank: int) -> list[str]:
    """One word for each dimension; an ellipsis becomes as many words (`...0`, `...1`) as dimensions are left."""
    found = _SUBSCRIPTS.findall(term)
    spare = rank - sum(word != "..." for word in found)
    return _with_ellipsis(term, [f"...{i}" for i in range(spare)])


def _with_ellipsis(term: str, dimensions: list[str]) -> list[str]:
    words: list[str] = []
    for word in _SUBSCRIPTS.findall(term):
        words += dimensions if word == "..." else [word]
    return words


def _implicit_output(x: list[str], w: list[str]) -> list[str]:
    """Without an arrow: the ellipsis, then the indices that appear once, in alphabetical order."""
    once = [i for i in x + w if (x + w).count(i) == 1]
    return [i for i in once if len(i) > 1] + sorted(i for i in once if len(i) == 1)
