"""Whether a kernel's answer is right: asked before its time is believed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHECKED = 32  # rows at either end of a result that are compared with the reference
_MOST_OTHER_CODES = 1e-3  # of all codes: a value on the border of two may fall to either side after a norm


def first_and_last_rows(m: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices of the rows of a result of m rows that are compared: masks go wrong at the ends."""
    ends = [*range(min(m, _CHECKED)), *range(max(_CHECKED, m - _CHECKED), m)]
    return torch.tensor(ends, dtype=torch.int64, device=device)


def difference(got: Tensor, wanted: Tensor) -> str:
    """Where two results differ by more than the order of sums can explain; '' if they don't.

    A float32 sum of k products in any order is off by about sqrt(k) u of its size, u = 2**-24; k is below 2**18.
    Operands are random, so the size of one value is that of all, the root of their mean square. Then one rounding to
    the dtype of the result, which a kernel and the reference may do to either side.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"the result is {got.dtype} {list(got.shape)}, not {wanted.dtype} {list(wanted.shape)}"
    a, b = got.double().cpu(), wanted.double().cpu()
    rounding = torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0.0
    bad = ~((a - b).abs() <= 2**-15 * b.square().mean().sqrt() + rounding * b.abs())  # NaN is bad too
    if not bad.any():
        return ""
    where = tuple(int(i) for i in bad.nonzero()[0])
    first = f"first at {list(where)}: {a[where]:.6g} instead of {b[where]:.6g}"
    return f"{int(bad.sum())} of {bad.numel()} values are wrong, {first}"


def codes_difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """The same of a quantization's codes and scales. A few codes may be the next ones, none may be farther off."""
    codes, expected = got[0].cpu(), wanted[0].cpu()
    if codes.shape != expected.shape or codes.dtype != expected.dtype:
        return f"the codes are {codes.dtype} {list(codes.shape)}, not {expected.dtype} {list(expected.shape)}"
    steps = (_number(codes) - _number(expected)).abs()
    other, far = int((steps > 0).sum()), int((steps > 1).sum())
    if far or other > _MOST_OTHER_CODES * codes.numel():
        return f"{other} of {codes.numel()} codes are wrong, {far} by more than a step"
    return difference(got[1].float().reshape(-1), wanted[1].float().reshape(-1))


def _number(codes: Tensor) -> Tensor:
    """Codes as numbers that follow each other: of a float its place among the floats, 0 for both zeros."""
    if not codes.dtype.is_floating_point:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 0x80, 0x80 - bits, bits)
