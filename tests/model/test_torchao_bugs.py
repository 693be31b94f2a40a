"""What fails in torchao 0.18 on ordinary models, and what happens here instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import AlreadyFrozen, PatternMatchesNothing

WEIGHTS = ["int8", "int4", "float8", "mxfp4"]


def frozen(module: Any, **config: Any) -> Any:
    fxquant.quantize(module, **config)
    fxquant.freeze(module)
    return module


def test_float16_sums_do_not_overflow_where_the_float_layer_is_finite() -> None:
    # torchao applies the scale to a finished float16 product of codes; here sums are float32 or int32 and scaled there
    torch.manual_seed(0)
    module: Any = nn.Linear(1024, 8, bias=False).half()
    with torch.no_grad():
        module.weight.fill_(0.01)
    x = torch.full((2, 1024), 10.0, dtype=torch.float16)
    wanted = module(x).detach()
    assert torch.isfinite(wanted).all()
    for config in ({"weights": "int8"}, {"weights": "int8", "activations": "int8"}):
        twin: Any = nn.Linear(1024, 8, bias=False).half()
        twin.load_state_dict(module.state_dict())
        torch.testing.assert_close(frozen(twin, **config)(x), wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_are_joined_by_cat_after_quantization(weights: str) -> None:
    # `weight` is a tensor that every function of torch takes: joined projections are quantized anew, or stay float
    torch.manual_seed(0)
    parts: Any = [frozen(nn.Linear(64, 32, bias=False), weights=weights) for _ in range(3)]
    fused: Any = nn.Linear(64, 96, bias=False)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([part.weight for part in parts]))
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), torch.cat([part(x) for part in parts], -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_tied_table_and_head_stay_one(weights: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"table": nn.Embedding(50, 64), "head": nn.Linear(64, 50, bias=False)})
    model.head.weight = model.table.weight
    report = fxquant.quantize(model, weights=weights)
    assert model.head.weight is model.table.weight
    fxquant.freeze(model)
    assert torch.equal(model.table(torch.arange(50)), model.head.weight + 0)
    assert fxquant.memory_footprint(model) <= 1.05 * report.bytes_after + 64
    assert report.bytes_before == 50 * 64 * 4


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention_is_quantized(weights: str, training: bool) -> None:
    torch.manual_seed(0)
    attention: Any = nn.MultiheadAttention(64, 4, batch_first=True).train(training)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = attention(x, x, x)[0]
        report = fxquant.quantize(attention, weights=weights)
        fxquant.freeze(attention)
        after = attention(x, x, x)[0]
    assert report.share == 1.0
    assert not any(p.dim() > 1 for p in attention.parameters())
    error = (after - before).norm() / before.norm()
    assert 0 < error < 0.25


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_what_says_that_it_is_quantized_also_runs(weights: str, activations: str | None) -> None:
    # torchao's quantize_ of a Conv2d succeeds, and its forward raises
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 4, 3, padding=1)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        before = conv(x)
        config: dict[str, Any] = {"weights": weights} | ({"activations": activations} if activations else {})
        assert fxquant.quantize(conv, **config).quantized
        fxquant.freeze(conv)
        assert 0 < (conv(x) - before).norm() / before.norm() < 0.25


def test_quantizing_twice_is_the_same_or_a_named_error() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    frozen(model, weights="int8")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    frozen(model, weights="int8")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(AlreadyFrozen, match="'0': frozen as w=int8/channel, asked to become w=int4"):
        fxquant.quantize(model, weights="int4")
    unfrozen = nn.Sequential(nn.Linear(64, 8))
    fxquant.quantize(unfrozen, weights="int8")
    fxquant.quantize(unfrozen, weights="int4/group32")
    fxquant.freeze(unfrozen)
    assert fxquant.quantization_map(unfrozen)["0"]["weights"] == "int4/group32"


@pytest.mark.parametrize("config", [{"weights": w} for w in WEIGHTS] + [{"weights": "int8", "activations": "int8"}])
@pytest.mark.parametrize("freeze", [False, True])
def test_an_empty_batch_gives_an_empty_output(config: dict[str, Any], freeze: bool) -> None:
    module = nn.Linear(64, 8)
    fxquant.quantize(module, **config)
    if freeze:
        fxquant.freeze(module)
    assert module(torch.zeros(0, 64)).shape == (0, 8)
    assert module(torch.zeros(3, 0, 64)).shape == (3, 0, 8)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_move_to_another_dtype_is_seen_in_the_weight(weights: str) -> None:
    module: Any = frozen(nn.Linear(64, 8), weights=weights)
    codes = module.state_dict()["weight_codes"].clone()
    scale = module.state_dict()["weight_scale"].clone()
    module.to(torch.bfloat16)
    assert module.weight.dtype is torch.bfloat16
    assert module(torch.randn(2, 64, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert torch.equal(module.state_dict()["weight_codes"], codes)
    assert torch.equal(module.state_dict()["weight_scale"].view(torch.uint8), scale.view(torch.uint8))


def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    configs: list[dict[str, Any]] = [{"include": "hed"}, {"exclude": ["0", "1"]}, {"rules": {"*.mlp.*": "int4wo"}}]
    for config in configs:
        with pytest.raises(PatternMatchesNothing):
            fxquant.quantize(model, weights="int8", **config)
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("group", [32, 128])
def test_rows_that_groups_do_not_divide_are_quantized_all_the_same(group: int) -> None:
    # torchao leaves such a layer float without a word; here the last group of a row is shorter
    torch.manual_seed(0)
    module: Any = nn.Linear(100, 8)
    x = torch.randn(4, 100)
    before = module(x).detach()
    report = fxquant.quantize(module, weights="int4", group_size=group)
    fxquant.freeze(module)
    assert report.share == 1.0
    assert module.state_dict()["weight_scale"].shape == (8, -(-100 // group))
    assert 0 < (module(x) - before).norm() / before.norm() < 0.15
