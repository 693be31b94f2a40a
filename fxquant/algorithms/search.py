"""Quantizing by a search: every block of granules has its ranges improved, then the whole is encoded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.algorithms.ranges import Range, codes_of, plain_range, scales_of
from fxquant.algorithms.rows import Rows, blocks
from fxquant.numerics import Codes, row_steps
from fxquant.spec import TensorSpec

# (granules, their plain ranges [g, 1] a side, spec, what scales stand under [g, 1] or None) -> their ranges, likewise
Search = Callable[[Rows, Range, TensorSpec, "Tensor | None"], Range]


def quantize_by(search: Search, x: Tensor, spec: TensorSpec) -> Codes:
    """Codes of x with the ranges that `search` finds; under the tensor scale that absmax gives, if there is one."""
    plain = plain_range(x, spec)
    if x.numel() == 0:
        return codes_of(x, plain, spec)
    x = x.detach()
    whole = _over_granules(plain, spec)
    if whole is not None and not spec.has_tensor_scale:  # the range of the multiple that the plain choice takes
        plain = Range(*2 * [scales_of(plain, spec).scale.to(torch.float32) * spec.qmax])
    found = Range(plain.low.clone(), plain.high.clone())
    each = found.high if whole is None else whole.expand_as(found.high).contiguous()
    for rows, (low, high, over) in blocks(x, (*found, each), spec.granularity):
        here = Range(low.reshape(-1, 1), high.reshape(-1, 1))
        better = search(rows, here, spec, None if whole is None else over.reshape(-1, 1))
        low.copy_(better.low.view(low.shape))
        high.copy_(better.high.view(high.shape))
    return codes_of(x, found, spec, whole)


def _over_granules(plain: Range, spec: TensorSpec) -> Tensor | None:
    """What the scales of granules stand under, and a search leaves alone: the tensor's scale, or the rows' steps.

    A lone granule's step is its scale, which the search is for.
    """
    if spec.scale == "stepped" and plain.high.shape[-1] > 1:
        return row_steps(plain.high, spec)
    return scales_of(plain, spec).tensor_scale if spec.has_tensor_scale else None
