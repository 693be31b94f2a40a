"""attention: softmax(query @ keyᵀ * scale) @ value, with a mask, for heads that share keys and values.

Computed in float32 and rounded once, to query's dtype. The CPU kernel goes over the keys once (FlashAttention, Dao et
al. 2022, arXiv:2205.14135; the running maximum and sum: Milakov and Gimelshein 2018, arXiv:1805.02867), so that its
sums are in another order than the reference's. What a mask leaves out for a whole block of queries it does not read.

Where a CPU multiplies pairs of bfloat16 (AVX512-BF16) the kernel does so with operands of that dtype: their products
are exact, the sums float32. The weights are rounded to bfloat16, as torch's own kernel does, and divided by the sum of
what was rounded; subnormals count as 0. Of bfloat16 the bits thus depend on the CPU; for no dtype do they depend on the
number of threads, or on the other queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.errors import ShapeMismatch, UnsupportedActivation
from fxquant.ops.checks import ACTIVATION_DTYPES, check_devices
from fxquant.ops.library import declare
from fxquant.ops.quantize import refuse

MASK_DTYPES = (torch.bool, *ACTIVATION_DTYPES)
_OP = "fxquant.attention"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    isa: int = 0,
) -> Tensor:
    """Attention as torch.nn.functional.scaled_dot_product_attention defines it, without dropout.

    query [batch, heads, queries, D]; key [batch, key_heads, keys, D] and value [batch, key_heads, keys, E], key_heads
    dividing heads: head h reads key head h // (heads / key_heads). All float32, bfloat16 or float16. mask [keys], or
    with up to three dimensions before, each 1 or that of [batch, heads, queries]: bool, where False leaves a key out,
    or one of the float dtypes, to be added to the scores. scale: None for 1/√D. causal: query i reads the keys up to i;
    beside a mask, what both leave. `isa` picks a kernel's instruction set, for tests; the reference has none.
    A query without keys gives 0, as torch's `_safe_softmax` and CPU kernel do.

    Returns [batch, heads, queries, E] in query's dtype, laid out as [batch, queries, heads, E].
    """
    check_attention(query, key, value, mask)
    batch, heads, queries, width = query.shape
    grouped = [batch, key.shape[1], heads // key.shape[1], queries]
    scores = (query.float() * factor_of(query, scale)).reshape(*grouped, width) @ key.float().mT.unsqueeze(2)
    scores = scores.reshape(batch, heads, queries, key.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    out = (weights.reshape(*grouped, key.shape[2]) @ value.float().unsqueeze(2)).reshape(
        batch, heads, queries, value.shape[-1]
    )
    return _laid_out(query, value).copy_(out)


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    isa: int = 0,
) -> Tensor:
    check_attention(query, key, value, mask)
    return _laid_out(query, value)


def factor_of(query: Tensor, scale: float | None) -> float:
    """What the query is multiplied by."""
    return scale if scale is not None else 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0


def check_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """The operands of attention fit together, as far as their sizes are known."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in ACTIVATION_DTYPES:
            raise UnsupportedActivation(f"{_OP}: {name}", x.dtype)
        if x.dim() != 4 or x.dtype != query.dtype:
            raise ShapeMismatch(_OP, f"{name} {_facts(x)}", f"[batch, heads, length, features] {query.dtype}")
    check_devices(_OP, query=query, key=key, value=value, mask=mask)
    (batch, heads, queries, width), (_, key_heads, keys, _) = query.shape, key.shape
    if _differ(key.shape, (batch, key_heads, keys, width)):
        raise ShapeMismatch(_OP, f"key {_facts(key)}", f"[{batch}, key_heads, keys, {width}]")
    if _differ(value.shape[:3], (batch, key_heads, keys)):
        raise ShapeMismatch(_OP, f"value {_facts(value)}", f"[{batch}, {key_heads}, {keys}, E]")
    if isinstance(heads, int) and isinstance(key_heads, int) and (key_heads == 0 or heads % key_heads):
        raise ShapeMismatch(_OP, f"{heads} heads of query and {key_heads} of key", "a multiple")
    if mask is not None:
        _check_mask(mask, (batch, heads, queries, keys))


def _check_mask(mask: Tensor, sizes: tuple[int, ...]) -> None:
    if mask.dtype not in MASK_DTYPES or not 1 <= mask.dim() <= 4:
        raise ShapeMismatch(_OP, f"mask {_facts(mask)}", "bool or float, of one to four dimensions")
    *leading, last = zip(mask.shape, sizes[4 - mask.dim() :], strict=True)
    if _differ(*zip(last, *(pair for pair in leading if pair[0] != 1), strict=True)):
        raise ShapeMismatch(_OP, f"mask {_facts(mask)}", f"{list(sizes)}, or 1 before the last,")


def _differ(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Among sizes that are known: comparing symbolic ones would guard the graph. The kernel compares when it runs."""
    pairs = zip(sizes, wanted, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _facts(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"


def _laid_out(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)


declare(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, float? scale=None, bool causal=False, "
    "int isa=0) -> Tensor",
    reference=attention,
    fake=_attention_fake,
    backward=refuse("attention"),
)
