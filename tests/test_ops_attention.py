"""attention: schema, reference, fake, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import FxQuantError, GradientsNeedTraining, ShapeMismatch, UnsupportedActivation
from fxquant.ops import reference
from tests.attention_problems import DTYPES, MASKS, SHAPES, assert_right, mask_of, operands

OP = torch.ops.fxquant.attention.default
MIDDLE = (2, 4, 2, 5, 9, 6, 3)


def samples() -> dict[str, tuple[Any, ...]]:
    o = operands(MIDDLE)
    return {
        "plain": o.all,
        "causal": (*o.all, None, 0.5, True),
        "bools": (*o.all, mask_of("shared", o)),
        "floats": (*o.all, mask_of("added bf16", o)),
        "turned": tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in o.all),
        "half": tuple(x.half() for x in o.all),
        "nothing": tuple(x[:0] for x in o.all),
    }


def test_the_schema() -> None:
    wanted = (
        "(Tensor query, Tensor key, Tensor value, Tensor? mask=None, float? scale=None, bool causal=False, int isa=0)"
    )
    assert str(OP._schema) == f"fxquant::attention{wanted} -> Tensor"


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OP, samples()[name])


@pytest.mark.parametrize("name", samples())
def test_the_fake_has_shape_dtype_and_strides_of_the_reference(name: str) -> None:
    args = samples()[name]
    real = reference.attention(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OP(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_right(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    o = operands(shape, dtype)
    mask = mask_of(kind, o)
    for scale, causal in ((None, False), (0.3, True)):
        assert_right(reference.attention(*o.all, mask, scale, causal), o, mask, scale, causal)


@pytest.mark.parametrize("kind", ["none", "shared", "batches", "added", "-inf"])
def test_torch_defines_it(kind: str) -> None:
    """A query without keys, and which key head a head reads, are as in torch."""
    o = operands((2, 6, 2, 7, 9, 8, 8))
    mask = mask_of(kind, o)
    if kind in ("shared", "-inf"):
        assert mask is not None
        mask = mask.clone()
        mask[..., 3, :] = False if mask.dtype == torch.bool else -math.inf
    want = F.scaled_dot_product_attention(*o.all, mask, enable_gqa=True)
    assert_right(want, o, mask)
    assert_right(reference.attention(*o.all, mask), o, mask)
    causal = F.scaled_dot_product_attention(*o.all, is_causal=True, enable_gqa=True)
    assert_right(causal, o, None, None, True)


def test_half_precision_is_rounded_once() -> None:
    o = operands(MIDDLE)
    query, key, value = (x.bfloat16() for x in o.all)
    want = reference.attention(query.float(), key.float(), value.float()).bfloat16()
    torch.testing.assert_close(reference.attention(query, key, value), want, rtol=0, atol=0)


WRONG: dict[str, tuple[Any, type[FxQuantError], str]] = {
    "integers": (lambda q, k, v: (q.int(), k, v), UnsupportedActivation, "attention: query: the activation has dtype"),
    "rank": (lambda q, k, v: (q, k[0], v), ShapeMismatch, r"met key \[2, 9, 6\] torch.float32, but \[batch, heads"),
    "dtypes": (lambda q, k, v: (q, k, v.half()), ShapeMismatch, r"met value \[2, 2, 9, 3\] torch.float16"),
    "features": (lambda q, k, v: (q, k[..., :5], v), ShapeMismatch, r"\[2, key_heads, keys, 6\] is needed"),
    "keys": (lambda q, k, v: (q, k, v[:, :, :8]), ShapeMismatch, r"\[2, 2, 9, E\] is needed"),
    "heads": (lambda q, k, v: (q[:, :3], k, v), ShapeMismatch, "3 heads of query and 2 of key"),
    "batch": (lambda q, k, v: (q[:1], k, v), ShapeMismatch, r"\[1, key_heads, keys, 6\]"),
    "mask's keys": (lambda q, k, v: (q, k, v, torch.ones(5, 1)), ShapeMismatch, r"met mask \[5, 1\]"),
    "mask's queries": (lambda q, k, v: (q, k, v, torch.ones(4, 9)), ShapeMismatch, r"but \[2, 4, 5, 9\], or 1"),
    "mask's dtype": (lambda q, k, v: (q, k, v, torch.ones(9).double()), ShapeMismatch, "bool or float"),
    "mask's rank": (lambda q, k, v: (q, k, v, torch.ones(1, 1, 1, 5, 9)), ShapeMismatch, "one to four dimensions"),
    "device": (lambda q, k, v: (q, k.to("meta"), v), ShapeMismatch, "key on device meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    change, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        reference.attention(*change(*operands(MIDDLE).all))


def test_it_has_no_gradient() -> None:
    query, key, value = operands(MIDDLE).all
    with pytest.raises(GradientsNeedTraining, match=r"fxquant\.attention"):
        OP(query.requires_grad_(), key, value).sum().backward()
