"""Attention for tests: operands, masks, the answer in float64, and the bound that float32 arithmetic gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

U = 2.0**-24  # unit roundoff of float32
TINY = 2.0**-126  # what is smaller is subnormal
U_OUT = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUBNORMAL_OUT = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}  # half of the smallest
KEY_BLOCK = 64

# batch, heads, key heads, queries, keys, features of a key, of a value: the smallest, then one off the blocks of 64
# keys, tiles of 4 and 6 rows, tasks of 128 rows, vectors of 4, 8 and 16 lanes.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 6, 2, 7, 9, 5, 3),
    (1, 3, 3, 5, 65, 17, 16),
    (2, 4, 1, 33, 63, 64, 64),
    (1, 2, 2, 129, 64, 8, 33),
    (1, 8, 2, 1, 129, 80, 80),
    (1, 130, 1, 2, 70, 12, 20),
    (1, 3, 1, 43, 200, 33, 96),
    (2, 4, 2, 37, 150, 64, 48),
]


@dataclass(frozen=True)
class Operands:
    """query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E]."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def scores_shape(self) -> list[int]:
        return [*self.query.shape[:3], self.key.shape[2]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 1) -> Operands:
    b, heads, key_heads, queries, keys, width, value_width = shape
    sizes = ((heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width))
    return Operands(*(torch.randn(b, *size, generator=generator(seed + i)).to(dtype) for i, size in enumerate(sizes)))


MASKS = ("none", "shared", "batches", "rows", "causal", "added", "added bf16", "-inf")


def mask_of(kind: str, o: Operands, seed: int = 7) -> Tensor | None:
    """One of MASKS; some leave queries without keys, and blocks of keys without queries."""
    b, heads, queries, keys = o.scores_shape
    random = generator(seed)
    match kind:
        case "none":
            return None
        case "shared":
            return torch.rand(queries, keys, generator=random) > 0.3
        case "batches":
            return torch.rand(b, 1, 1, keys, generator=random) > 0.9
        case "rows":
            return torch.rand(1, heads, queries, keys, generator=random) > 0.97
        case "causal":
            return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        case "added":
            return torch.randn(queries, keys, generator=random) * 3
        case "added bf16":
            return torch.randn(b, 1, queries, keys, generator=random).bfloat16()
        case _:
            left = torch.rand(queries, keys, generator=random) > 0.8
            return torch.where(left, 0.0, -math.inf).expand(b, 1, queries, keys)


def wide(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in float64, keys and values repeated for each head."""
    times = o.query.shape[1] // o.key.shape[1]
    key, value = (x.double().repeat_interleave(times, 1) for x in (o.key, o.value))
    return o.query.double(), key, value


def attention64(
    o: Operands, mask: Tensor | None = None, scale: float | None = None, causal: bool = False, paired: bool = False
) -> tuple[Tensor, Tensor]:
    """The answer in float64, [B, H, Q, E], and how far off it float32 arithmetic may be, to first order.

    A score is off by (D + 4) u of the sum of |q k| (D products and sums, the scaled query, the scale), and u of itself
    once the mask is added. Its exponential e^x, x = score - maximum, by 3 u |x| + 8 u relative: the difference, its
    product with log2(e), the constant, the polynomial (2 units, as Cephes says) and the scaling by 2^n. Each block of
    keys multiplies once more with such an exponential. The quotient of the two sums, of K and of as many blocks, is
    then off by what the weights of a row are off, on both sides of the fraction.

    paired: bfloat16 operands multiplied two by two. A weight is off by another 2^-8, in the sum of values and in what
    that is divided by: weight k moves the result by 2^-8 of value k's distance from it, and the quotient's second order
    is at most 2^-7 of that. The division is two roundings. Subnormals among factors, sums and results count as 0, up to
    two for each product.
    """
    query, key, value = wide(o)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.mT * factor
    magnitude = query.abs() @ key.abs().mT * abs(factor)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e300)
    x = scores - top
    total = x.exp().sum(-1, keepdim=True)
    weights = torch.where(total > 0, x.exp() / total, 0.0)
    there = scores > -math.inf
    keys = scores.shape[-1]
    blocks = math.ceil(keys / KEY_BLOCK)
    off = (query.shape[-1] + 4) * U * magnitude + U * (scores.abs() + 3 * x.abs() * 2 + 8 * (1 + blocks))
    off = torch.where(there, off + (2 * query.shape[-1] + 1) * TINY * abs(factor) * paired, 0.0)
    row = (weights * off).sum(-1, keepdim=True)
    sums = (keys + blocks + 8) * U * 2
    bound = (weights * (off + row + sums)) @ value.abs()
    out = weights @ value
    if paired:
        moved = U_OUT[torch.bfloat16] * apart(weights, value, out)
        bound = (bound + moved) * (1 + 2.0**-7) + U * out.abs() + (2 * keys + 2) * TINY
    floor = keys * math.exp(-87.0) * value.abs().amax((-2, -1), keepdim=True)  # smaller weights count as 0
    off = bound + U_OUT[o.query.dtype] * out.abs() + floor
    return out, off * (1 + 2.0**-10) + SUBNORMAL_OUT[o.query.dtype]


def apart(weights: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """Each result's mean distance from the values that it is the mean of, by their weights."""
    rows = zip(weights.flatten(0, 1), value.flatten(0, 1), out.flatten(0, 1), strict=True)
    distances = [(w.unsqueeze(-1) * (v - y.unsqueeze(1)).abs()).sum(1) for w, v, y in rows]
    return torch.stack(distances).reshape(out.shape) if distances else torch.zeros_like(out)


def assert_right(got: Tensor, o: Operands, *how: object, paired: bool = False) -> None:
    """got is the attention of the operands, within the bound; how: mask, scale, causal."""
    want, bound = attention64(o, *how, paired=paired)  # pyright: ignore[reportArgumentType]
    assert (got.dtype, got.shape) == (o.query.dtype, want.shape)
    error = (got.double() - want).abs()
    bad = ~(error <= bound)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        worst = (error / bound).max()
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} are off, at worst {worst:.3g} times the bound; the first at {at}: "
            f"got {got[at].item()!r}, want {want[at].item()!r}, bound {bound[at].item():.3g}"
        )
