"""The CPU kernel of attention: exact where one key is left, within float32's bound elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.ops import reference
from tests.attention_problems import (
    DTYPES,
    MASKS,
    SHAPES,
    Operands,
    assert_right,
    generator,
    mask_of,
    operands,
)
from tests.kernels.cpu_helpers import assert_equal, pairs

attention = torch.ops.fxquant.attention
pytestmark = pytest.mark.usefixtures("kernels")
MIDDLE = (2, 4, 2, 37, 150, 24, 40)


def one_key_left(o: Operands, seed: int = 3) -> tuple[Tensor, Tensor]:
    """A mask that leaves each query one key, and the values of these keys."""
    b, heads, queries, keys = o.scores_shape
    chosen = torch.randint(keys, (b, heads, queries), generator=generator(seed))
    mask = torch.nn.functional.one_hot(chosen, keys).bool()
    values = o.value.repeat_interleave(heads // o.value.shape[1], 1)
    return mask, values.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_one_key_is_left_its_value_comes_out_bit_for_bit(
    isa: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    o = operands(shape, dtype)
    mask, want = one_key_left(o)
    assert_equal(attention(*o.all, mask, isa=isa), want)
    assert_equal(attention(*o.all, torch.where(mask, 0.0, -math.inf), isa=isa), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 16, 64, 128, 256])
def test_equal_scores_give_the_mean_exactly(isa: int, keys: int, dtype: torch.dtype) -> None:
    o = operands((1, 4, 2, 9, keys, 8, 20), dtype)
    value = torch.randint(-255, 256, o.value.shape, generator=generator(2)).to(dtype)
    want = value.float().mean(2, keepdim=True).repeat_interleave(2, 1).expand(1, 4, 9, 20).to(dtype)
    assert_equal(attention(torch.zeros_like(o.query), o.key, value, isa=isa), want)
    lowest = torch.full((9, keys), torch.finfo(torch.float32).min)  # it swallows the scores
    assert_equal(attention(o.query, o.key, value, lowest, isa=isa), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bound(isa: int, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    o = operands(shape, dtype)
    mask = mask_of(kind, o)
    for causal in (False, True):
        got = attention(*o.all, mask, None, causal, isa)
        assert_right(got, o, mask, None, causal, paired=pairs(isa, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 40.0])
def test_any_scale(isa: int, scale: float, dtype: torch.dtype) -> None:
    o = operands(MIDDLE, dtype)
    assert_right(attention(*o.all, None, scale, isa=isa), o, None, scale, paired=pairs(isa, dtype))


def test_the_exponential_at_every_distance(isa: int) -> None:
    """Two keys, 0 and x, with values 0 and 1: e^x / (1 + e^x), from 1/2 down to where it is 0."""
    x = torch.linspace(0, -100, 20_001)
    key = torch.stack([torch.zeros_like(x), x]).T.reshape(1, -1, 2, 1)
    value = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand_as(key)
    o = Operands(torch.ones(1, len(x), 1, 1), key, value)
    got = attention(*o.all, isa=isa)
    assert_right(got, o)
    assert got[0, -1].item() == 0.0
    assert int((got == 0).sum()) < 2600  # from e^-87.7 on


def test_a_causal_mask_is_the_causal_flag_bit_for_bit(isa: int) -> None:
    o = operands(MIDDLE)
    mask = torch.ones(37, 150, dtype=torch.bool).tril()
    want = attention(*o.all, None, None, True, isa)
    assert_equal(attention(*o.all, mask, isa=isa), want)
    assert_equal(attention(*o.all, torch.where(mask, 0.0, -math.inf), isa=isa), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_query_depends_on_the_others(isa: int, dtype: torch.dtype) -> None:
    o = operands((2, 4, 2, 150, 150, 24, 40), dtype)
    mask = mask_of("causal", o)
    assert mask is not None
    want = attention(*o.all, mask, isa=isa)
    for some in (slice(0, 1), slice(70, 73), slice(140, 150)):
        assert_equal(attention(o.query[:1, :, some], o.key[:1], o.value[:1], mask[some], isa=isa), want[:1, :, some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_heads_are_repeated_heads_bit_for_bit(isa: int, dtype: torch.dtype) -> None:
    o = operands((2, 6, 2, 50, 90, 32, 32), dtype)
    mask = mask_of("shared", o)
    key, value = (x.repeat_interleave(3, 1) for x in (o.key, o.value))
    assert_equal(attention(*o.all, mask, isa=isa), attention(o.query, key, value, mask, isa=isa))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 300, 300, 64, 64), (3, 12, 4, 64, 100, 32, 32), (1, 9, 3, 1, 4000, 64, 64)]
)
def test_no_result_depends_on_the_number_of_threads(
    isa: int, threads: None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    o = operands(shape, dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(attention(*o.all, None, None, True, isa))
    for other in results[1:]:
        assert_equal(other, results[0])


def in_nan(x: Tensor) -> Tensor:
    """x as a part of a larger tensor of NaN."""
    b, heads, n, width = x.shape
    whole = x.new_full((b, heads + 1, n + 3, width + 5), math.nan)
    part = whole[:, 1:, 2:-1, 3:-2]
    return part.copy_(x)


LAYOUTS = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "turned": lambda x: x.mT.contiguous().mT,
    "a part": in_nan,
    "one batch": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_any_layout(isa: int, layout: str, dtype: torch.dtype) -> None:
    o = operands((2, 4, 2, 7, 70, 24, 19), dtype)
    views = [LAYOUTS[layout](x) for x in o.all]
    assert_equal(attention(*views, isa=isa), attention(*(x.contiguous() for x in views), isa=isa))


@pytest.mark.parametrize("kind", ["shared", "rows", "added", "added bf16"])
def test_masks_of_any_layout(isa: int, kind: str) -> None:
    o = operands(MIDDLE)
    mask = mask_of(kind, o)
    assert mask is not None
    whole = mask.expand(o.scores_shape).contiguous()
    want = attention(*o.all, whole, isa=isa)
    for view in (mask, mask.mT.contiguous().mT, torch.cat([mask, mask], -1)[..., 150:], whole[:, :, :, :]):
        assert_equal(attention(*o.all, view, isa=isa), want)
    assert_equal(attention(*o.all, whole[0, 0, 0], isa=isa), attention(*o.all, whole[:1, :1, :1], isa=isa))


def test_a_query_without_keys_gives_zero(isa: int) -> None:
    o = operands(MIDDLE)
    mask = torch.ones(37, 150, dtype=torch.bool)
    mask[[0, 5, 36]] = False
    got = attention(*o.all, mask, isa=isa)
    assert bool((got[:, :, [0, 5, 36]] == 0).all())
    assert_right(got, o, mask)
    none = Operands(o.query, o.key[:, :, :0], o.value[:, :, :0])
    assert bool((attention(*none.all, isa=isa) == 0).all())


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 4, 8, 8), (1, 2, 1, 0, 4, 8, 8), (1, 2, 1, 3, 4, 8, 0), (1, 2, 1, 3, 4, 0, 8)]
)
def test_nothing_to_do(isa: int, shape: tuple[int, ...]) -> None:
    o = operands(shape)
    torch.testing.assert_close(attention(*o.all, isa=isa), reference.attention(*o.all))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [MIDDLE, SHAPES[-1]], ids=str)
def test_what_is_not_finite_stays_where_it_belongs(
    isa: int, shape: tuple[int, ...], bad: float, dtype: torch.dtype
) -> None:
    o = operands(shape, dtype)
    clean = attention(*o.all, isa=isa)
    query = o.query.clone()
    query[0, 1, 20, 3] = bad
    got = attention(query, o.key, o.value, isa=isa)
    assert bool(got[0, 1, 20].isnan().all())
    got[0, 1, 20] = clean[0, 1, 20]
    assert_equal(got, clean)
    value = o.value.clone()
    value[0, 1, 70, 7] = bad
    got = attention(o.query, o.key, value, isa=isa)
    assert not got[0, 2:, :, 7].isfinite().any()
    got[0, 2:, :, 7] = clean[0, 2:, :, 7]
    assert_equal(got, clean)


def test_a_block_that_no_query_reads_may_hold_anything(isa: int) -> None:
    """A cache is longer than what has been written to it."""
    o = operands((1, 6, 2, 1, 256, 16, 16))
    mask = torch.arange(256).view(1, 1, 1, -1) < 100
    want = attention(*o.all, mask, isa=isa)
    for x in (o.key, o.value):
        x[:, :, 128:] = math.nan
    assert_equal(attention(*o.all, mask, isa=isa), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", [97, 98, 101])
def test_keys_behind_the_last_one_left_may_hold_anything(isa: int, left: int, dtype: torch.dtype) -> None:
    o = operands((1, 6, 2, 1, 128, 16, 16), dtype)
    mask = torch.arange(128).view(1, 1, 1, -1) < left
    want = attention(*o.all, mask, isa=isa)
    for x in (o.key, o.value):
        x[:, :, left:] = math.nan
    assert_equal(attention(*o.all, mask, isa=isa), want)


@pytest.mark.parametrize("factor", [1e6, 1e18])
def test_huge_scores(isa: int, factor: float) -> None:
    o = operands(MIDDLE)
    o = Operands(o.query * factor, o.key * factor**0.5, o.value)
    best = (o.query.double() @ o.key.repeat_interleave(2, 1).double().mT).topk(2, -1)
    assert (best.values[..., 0] - best.values[..., 1]).min() > 1000  # so one key has all the weight
    want = o.value.repeat_interleave(2, 1).gather(2, best.indices[..., :1].expand(-1, -1, -1, 40))
    assert_equal(attention(*o.all, isa=isa), want)


def test_a_tall_score_in_the_last_block(isa: int) -> None:
    """What was summed up before is scaled down to nothing."""
    o = operands(MIDDLE)
    mask = torch.zeros(37, 150)
    mask[:, 149] = 500.0
    want = o.value[:, :, 149:].repeat_interleave(2, 1).expand(-1, -1, 37, -1)
    assert_equal(attention(*o.all, mask, isa=isa), want)


def test_the_result_is_laid_out_for_what_follows(isa: int) -> None:
    got = attention(*operands(MIDDLE).all, isa=isa)
    assert got.transpose(1, 2).is_contiguous()


def test_an_operand_that_does_not_fit_is_named() -> None:
    o = operands(MIDDLE)
    call = attention.default
    with pytest.raises(RuntimeError, match="value has size 149 where"):
        call(o.query, o.key, o.value[:, :, :149])
    with pytest.raises(RuntimeError, match="4 heads of the query are no multiple of 3"):
        call(o.query, *(torch.cat([x, x[:, :1]], 1) for x in (o.key, o.value)))
    with pytest.raises(RuntimeError, match="mask has size 150 where"):
        call(*o.all, torch.ones(150, 37))
    with pytest.raises(RuntimeError, match="mask is Long"):
        call(*o.all, torch.ones(150, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="of different dtypes"):
        call(o.query.bfloat16(), o.key, o.value)
    with pytest.raises(RuntimeError, match="query is Double"):
        call(*(x.double() for x in o.all))
    with pytest.raises(RuntimeError, match="have 3, 4 and 4 dimensions"):
        call(o.query[0], o.key, o.value)
