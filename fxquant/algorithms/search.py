"""Quantizing by a search: every block of granules has its ranges improved, then the whole is encoded once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fxquant.algorithms.ranges import Range, codes_of, plain_range, scales_of
from fxquant.algorithms.rows import Rows, blocks
from fxquant.numerics import Codes
from fxquant.spec import TensorSpec

# (granules, their plain ranges [g, 1] a side, spec, tensor scale [1, 1] or None) -> their ranges, [g, 1] a side.
Search = Callable[[Rows, Range, TensorSpec, "Tensor | None"], Range]


def quantize_by(search: Search, x: Tensor, spec: TensorSpec) -> Codes:
    """Codes of x with the ranges that `search` finds; under the tensor scale that absmax gives, if there is one."""
    plain = plain_range(x, spec)
    if x.numel() == 0:
        return codes_of(x, plain, spec)
    x = x.detach()
    whole = scales_of(plain, spec).tensor_scale if spec.has_tensor_scale else None
    found = Range(plain.low.clone(), plain.high.clone())
    for rows, views in blocks(x, found, spec.granularity):
        here = Range(views.low.reshape(-1, 1), views.high.reshape(-1, 1))
        better = search(rows, here, spec, None if whole is None else whole.view(1, 1))
        views.low.copy_(better.low.view(views.low.shape))
        views.high.copy_(better.high.view(views.high.shape))
    return codes_of(x, found, spec, whole)
