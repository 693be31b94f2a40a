"""QMultiheadAttention: torch's own with the rounded weights, in every way of calling it."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.errors import FrozenWeight, InvalidOption, NestedInput, ShapeMismatch
from fxquant.nn import QLinear, QModule, QMultiheadAttention
from tests.helpers import assert_same

# Some sums of 64 and 20 products one behind the other; where both sides decode, they do so alike.
DEPTH = 128
FORMATS = ("int8", "int4", "int8/tensor", "float8_e4m3fn", "mxfp4", "nvfp4", "int4/block32x16", "int2/group8/shift")
MODULES: dict[str, dict[str, Any]] = {
    "plain": {"embed_dim": 64},
    "does-not-split": {"embed_dim": 20},
    "no-bias": {"embed_dim": 64, "bias": False},
    "other-widths": {"embed_dim": 64, "kdim": 40, "vdim": 24},
    "longer-keys": {"embed_dim": 64, "add_bias_kv": True, "add_zero_attn": True},
}
LAYOUTS = ("seq-first", "batch-first", "unbatched")
B, H, L, S = 3, 4, 5, 7


def attention(weights: str = "int8", *, name: str = "plain", **fields: Any) -> QMultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(num_heads=H, **{**MODULES[name], **fields}).eval()
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    fxquant.quantize(module, weights=weights)
    assert isinstance(module, QMultiheadAttention)
    assert isinstance(module.out_proj, QLinear)
    return module


def twin_of(module: QMultiheadAttention, name: str = "plain", **fields: Any) -> nn.MultiheadAttention:
    """torch's module with the values that the codes of `module` stand for."""
    twin = nn.MultiheadAttention(num_heads=H, **{**MODULES[name], **fields}).eval()
    state = {path: p.detach().clone() for path, p in module.named_parameters()}
    for path, part in {"": module, "out_proj.": module.out_proj}.items():
        assert isinstance(part, QModule)
        state |= {path + key: part.quantized_weight(key).dequantize() for key in part.matrix_names()}
    twin.load_state_dict(state)
    return twin


def inputs(module: nn.MultiheadAttention, layout: str = "seq-first") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    lead = {"seq-first": lambda n: (n, B), "batch-first": lambda n: (B, n), "unbatched": lambda n: (n,)}[layout]
    widths = (module.embed_dim, module.kdim, module.vdim)
    query, key, value = (torch.randn(*lead(n), width) for n, width in zip((L, S, S), widths, strict=True))
    return query, key, value


def masks(batch: int, keys: int) -> Iterator[dict[str, Any]]:
    """Every kind of mask, and both together; no query is kept from all keys."""
    torch.manual_seed(2)
    causal = torch.triu(torch.ones(L, keys, dtype=torch.bool), 1)
    each = torch.rand(batch * H, L, keys) < 0.4
    each[..., 0] = False
    padding = torch.arange(keys) >= torch.tensor([keys, 2, 3])[:batch, None]
    padding = padding if batch > 1 else padding[0]
    yield {}
    yield {"attn_mask": causal}
    yield {"attn_mask": torch.randn(L, keys)}
    yield {"attn_mask": each}
    yield {"attn_mask": torch.randn(batch * H, L, keys)}
    yield {"key_padding_mask": padding}
    yield {"key_padding_mask": torch.zeros(padding.shape).masked_fill(padding, -3.0)}
    yield {"attn_mask": each, "key_padding_mask": padding}
    yield {"attn_mask": causal, "is_causal": True}
    yield {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding}


def calls(module: nn.MultiheadAttention, layout: str) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    query, key, value = inputs(module, layout)
    ways = [(query, key, value)]
    if module.kdim == module.embed_dim == module.vdim:
        ways += [(query, query, query), (query, key, key), (query, query, query.clone())]
    for way, shown in itertools.product(ways, ({"need_weights": False}, {}, {"average_attn_weights": False})):
        keys = L if way[1].shape[:-1] == query.shape[:-1] else S
        for mask in masks(1 if layout == "unbatched" else B, keys):
            yield way, {**mask, **shown}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_it_gives_what_torch_gives_with_the_rounded_weights(name: str, layout: str) -> None:
    fields: dict[str, Any] = {"batch_first": layout == "batch-first"}
    module = attention(name=name, **fields)
    twin = twin_of(module, name, **fields)
    for _ in ("rounded", "frozen"):
        with torch.no_grad():
            for way, options in calls(module, layout):
                assert_same(module(*way, **options), twin(*way, **options), DEPTH)
        fxquant.freeze(module)
    assert module.is_frozen
    assert module.out_proj.is_frozen


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["plain", "does-not-split", "other-widths"])
def test_every_format_in_self_and_cross_attention(name: str, weights: str) -> None:
    module = attention(weights, name=name)
    twin = twin_of(module, name)
    query, key, value = inputs(module)
    ways = [(query, key, value)] + [(query, query, query), (query, key, key)] * (name != "other-widths")
    for _ in ("rounded", "frozen"):
        with torch.no_grad():
            for way in ways:
                assert_same(module(*way), twin(*way), DEPTH)
        fxquant.freeze(module)


@pytest.mark.parametrize("name", ["plain", "does-not-split", "other-widths"])
@pytest.mark.parametrize("preset", ["int8dq", "int4dq", "fp8dq"])
def test_inputs_are_rounded_as_asked_for(preset: str, name: str) -> None:
    module = nn.MultiheadAttention(num_heads=H, **MODULES[name]).eval()
    fxquant.quantize(module, preset, exclude="out_proj")
    assert isinstance(module, QMultiheadAttention)
    twin = nn.MultiheadAttention(num_heads=H, **MODULES[name]).eval()
    state = {**module.state_dict(), **{key: module.quantized_weight(key).dequantize() for key in module.matrix_names()}}
    twin.load_state_dict(state)
    query, key, value = inputs(module)
    rounded = {id(x): torch.ops.fxquant.fake_quantize(x, module._activation_spec) for x in (query, key, value)}
    assert not torch.equal(rounded[id(query)], query)
    ways = [(query, key, value)] + [(query, query, query), (query, key, key)] * (name != "other-widths")
    for _ in ("rounded", "frozen"):
        with torch.no_grad():
            for way in ways:
                assert_same(module(*way), twin(*(rounded[id(x)] for x in way)), DEPTH)
        fxquant.freeze(module)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_dropout_while_it_trains(frozen: bool, need_weights: bool) -> None:
    module = attention(dropout=0.3)
    twin = twin_of(module, dropout=0.3).train()
    module.train()
    if frozen:
        fxquant.freeze(module)
    query, key, value = inputs(module)
    torch.manual_seed(7)
    got = module(query, key, value, need_weights=need_weights)
    torch.manual_seed(7)
    assert_same(got, twin(query, key, value, need_weights=need_weights), DEPTH)
    assert not torch.equal(module(query, key, value)[0], got[0])


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(frozen: bool) -> None:
    """To inputs as through the rounded weights; to the float weight as if it were not rounded."""
    module = attention("int4", name="longer-keys")
    twin = twin_of(module, "longer-keys")
    if frozen:
        fxquant.freeze(module)
    found = []
    for one in (module, twin):
        query, key, value = (x.requires_grad_() for x in inputs(module))
        one(query, key, value)[0].square().sum().backward()
        found.append([query.grad, key.grad, value.grad, one.in_proj_bias.grad])
    assert_same(found[0], found[1], 8 * DEPTH)
    assert module.bias_k is not None
    assert module.bias_k.grad is not None
    if not frozen:
        assert_same(module.in_proj_weight.grad, twin.in_proj_weight.grad, 8 * DEPTH)
        assert_same(module.out_proj.weight.grad, twin.out_proj.weight.grad, 8 * DEPTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    module = attention(name="longer-keys")
    twin = twin_of(module, "longer-keys")
    query, key, value = inputs(module)
    mask = torch.triu(torch.ones(L, S, dtype=torch.bool), 1)
    with torch.no_grad():
        want, shown = twin(query, key, value, attn_mask=mask)
        for _ in ("rounded", "frozen"):
            with torch.autocast("cpu", dtype):
                cast = module(query, key, value, attn_mask=mask)
            assert cast[0].dtype is dtype
            half = copy.deepcopy(module).to(dtype)
            y, weights = half(*(x.to(dtype) for x in (query, key, value)), attn_mask=mask)
            assert y.dtype is dtype
            for got in (cast[0], y):
                torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
            torch.testing.assert_close(weights.float(), shown, rtol=0.05, atol=0.02)
            fxquant.freeze(module)


class Calls(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.floats: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.floats.add(tuple(out.shape))
        return out

    def count(self, word: str) -> int:
        return sum(word in name for name in self.names)


@pytest.mark.parametrize("name", ["plain", "does-not-split", "other-widths"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_no_float_copy_of_a_frozen_weight(weights: str, name: str) -> None:
    module = attention(weights, name=name)
    shapes = {tuple(p.shape) for key in module.matrix_names() if (p := module._parameters[key]) is not None}
    fxquant.freeze(module)
    query, key, value = inputs(module)
    with torch.no_grad(), Calls() as seen:
        module(query, key, value)
        if name != "other-widths":
            module(query, query, query)
            module(query, key, key)
    assert not seen.floats & shapes
    assert seen.count("linear_weight_only") == (4 if name == "other-widths" else 4 + 2 + 3)


def encoder(config: str = "int8dq", **fields: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, H, 96, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    fxquant.quantize(model, config, **fields)
    return model


FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "nested")


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_fused_encoder_does_not_pass_it_by(mode: Any, padded: bool) -> None:
    model = encoder()
    x, lengths = torch.randn(B, L, 64), torch.tensor([L, 2, 3])
    padding = torch.arange(L) >= lengths[:, None] if padded else None
    with torch.enable_grad():
        want = model(x, src_key_padding_mask=padding)  # never fused: gradients are asked for
    with mode(), Calls() as rounded:
        assert_same(model(x, src_key_padding_mask=padding), want, DEPTH)
    assert rounded.count("fake_quantize_weight") == 2 * 4
    fxquant.freeze(model)
    with mode(), Calls() as frozen:
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), want, rtol=0.0, atol=0.05)
    assert frozen.count("int8_linear_dynamic") == 2 * 4
    assert not any(frozen.count(name) + rounded.count(name) for name in FUSED)


@pytest.mark.parametrize("frozen", [True, False])
def test_attention_alone_in_a_float_layer(frozen: bool) -> None:
    """The layer was never seen by `quantize`: what it asks of its attention keeps it from the fused path."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, H, 96, dropout=0.0, batch_first=True).eval()
    fxquant.quantize(layer.self_attn, "int8dq")
    if frozen:
        fxquant.freeze(layer.self_attn)
    with torch.no_grad(), Calls() as seen:
        layer(torch.randn(B, L, 64))
    assert seen.count("int8_linear_dynamic" if frozen else "fake_quantize_weight") == 2
    assert not seen.count("_transformer_encoder_layer_fwd")


def test_encoder_and_decoder_together() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(64, H, 1, 1, 96, dropout=0.0, batch_first=True).eval()
    report = fxquant.quantize(model, "int8dq")
    assert report.linear_share == 1.0
    source, target = torch.randn(B, S, 64), torch.randn(B, L, 64)
    causal = model.generate_square_subsequent_mask(L)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "src_key_padding_mask": torch.zeros(B, S, dtype=torch.bool)}
    with torch.no_grad():
        want = model(source, target, **options)
        fxquant.freeze(model)
        with Calls() as seen:
            got = model(source, target, **options)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.05)
    assert seen.count("int8_linear_dynamic") == 4 + (2 + 3 + 2)  # q apart from k and v in the cross-attention


def test_a_float_attention_keeps_the_linear_that_it_reads() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x, x, x)[0]

    model = nn.ModuleDict({"mine": Mine(64, H), "torchs": nn.MultiheadAttention(64, H)})
    report = fxquant.quantize(model, "int8wo", include=["mine", "torchs.out_proj"])
    assert not report.quantized
    reasons = {row.path: row.reason for row in report.rows}
    assert "'mine', which stays float" in reasons["mine.out_proj"]
    assert "forward of its own" in reasons["mine.out_proj"]
    assert "'torchs', which stays float" in reasons["torchs.out_proj"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("weights", ["int8", "int4", "nvfp4", "int4/block32x16"])
def test_a_state_dict_gives_the_same_module_again(weights: str, name: str) -> None:
    module, other = attention(weights, name=name), attention(weights, name=name)
    fxquant.freeze(module)
    state = copy.deepcopy(module.state_dict())
    names = module.matrix_names()
    assert set(names).isdisjoint(state)
    assert all(state[f"{key}_codes"].shape[0] == module.matrix_shape(key)[0] for key in names)
    with torch.no_grad():
        for key in names:
            getattr(other, key).zero_()
    assert not any(other.load_state_dict(state, strict=True))
    with torch.no_grad():
        way = inputs(module)
        assert_same(other(*way), module(*way), 0)
    with pytest.raises(RuntimeError, match="not the codes of"):
        other.load_state_dict({key: t for key, t in state.items() if not key.endswith("_codes")})


@pytest.mark.parametrize("name", ["plain", "other-widths"])
def test_requantize_onto_meta(name: str) -> None:
    module = attention("int4", name=name)
    fxquant.freeze(module)
    with torch.device("meta"):
        other = nn.MultiheadAttention(num_heads=H, **MODULES[name]).eval()
    fxquant.requantize(other, module.state_dict(), fxquant.quantization_map(module))
    with torch.no_grad():
        way = inputs(module)
        assert_same(other(*way), module(*way), 0)


@pytest.mark.parametrize("name", ["plain", "other-widths"])
@pytest.mark.parametrize("frozen", [True, False])
def test_copies_and_pickles_are_equal(frozen: bool, name: str) -> None:
    module = attention("int4", name=name)
    module.register_forward_hook(_keep)
    if frozen:
        fxquant.freeze(module)
    way = inputs(module)
    with torch.no_grad():
        want = module(*way)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_same(twin(*way), want, 0)
            assert twin.is_frozen is frozen
            assert len(twin._forward_hooks) == 1
    assert isinstance(module, nn.MultiheadAttention)
    module.share_memory()
    assert_same(module(*way), want, 0)


def _keep(*_: Any) -> None:
    """A hook that a pickle can find."""


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["plain", "other-widths"])
def test_one_graph_forward_and_backward(name: str, frozen: bool) -> None:
    module = nn.MultiheadAttention(num_heads=H, **MODULES[name])
    fxquant.quantize(module, "int8dq")
    if frozen:
        fxquant.freeze(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    query, key, value = (x.requires_grad_() for x in inputs(module))
    for way in [(query, key, key), (query, query, query)] if name == "plain" else [(query, key, value)]:
        found = []
        for one in (compiled, module):
            query.grad = None
            y, weights = one(*way)
            (y.square().sum() + weights.square().sum()).backward()
            found.append((y, weights, query.grad))
        assert_same(found[0], found[1], DEPTH)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["plain", "other-widths"])
def test_frozen_weights_can_be_read_and_not_written(name: str) -> None:
    module = attention(name=name)
    want = {key: module.quantized_weight(key).dequantize() for key in module.matrix_names()}
    fxquant.freeze(module)
    for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        held = getattr(module, key)
        assert (held is None) == (key not in want)
        if held is not None:
            assert held.shape == want[key].shape
            assert torch.equal(held + 0, want[key])
            with pytest.raises(FrozenWeight, match=key):
                held.zero_()
            with pytest.raises(FrozenWeight, match=key):
                setattr(module, key, nn.Parameter(want[key]))


def test_a_calibration_gives_all_inputs_one_range() -> None:
    module = nn.MultiheadAttention(64, H).eval()
    fxquant.quantize(module, weights="int8", activations="int8")
    query, key, value = inputs(module)
    with torch.no_grad():
        want = module(query, 3 * key, value)
        with fxquant.Calibration(momentum=0.0):
            module(query, 3 * key, value)
        assert isinstance(module, QMultiheadAttention)
        assert module.input_scale is not None
        most = torch.cat([t.flatten() for t in (query, 3 * key, value)]).abs().max()
        torch.testing.assert_close(module.input_scale, most / 127)
        rounded = module(query, 3 * key, value)
        fxquant.freeze(module)
        with Calls() as seen:
            frozen = module(query, 3 * key, value)
    assert seen.count("int8_linear_static") == 4
    torch.testing.assert_close(rounded, want, rtol=0.0, atol=0.1)
    assert_same(frozen, rounded, DEPTH)


def test_what_does_not_go_together_is_named() -> None:
    module = attention()
    query, key, value = inputs(module)
    nested = torch.nested.nested_tensor([torch.randn(2, 64), torch.randn(3, 64)], layout=torch.jagged)
    with pytest.raises(NestedInput, match="to_padded_tensor"):
        module(nested, nested, nested)
    with pytest.raises(InvalidOption, match="is_causal"):
        module(query, query, query, is_causal=True)
    for wrong in ((query, key, value[:-1]), (query, key[:, :2], value[:, :2]), (query, key[0], value[0])):
        with pytest.raises(ShapeMismatch, match="as many keys as values"):
            module(*wrong)
    with pytest.raises(ShapeMismatch, match=r"attn_mask of shape \[7, 5\]"):
        module(query, key, value, attn_mask=torch.zeros(S, L))
    with pytest.raises(ShapeMismatch, match=r"key_padding_mask of shape \[7, 3\]"):
        module(query, key, value, key_padding_mask=torch.zeros(S, B))
    with pytest.raises(ShapeMismatch, match="a bool or float mask"):
        module(query, key, value, attn_mask=torch.zeros(L, S, dtype=torch.uint8))
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        _ = module.weight


@pytest.mark.parametrize("frozen", [True, False])
def test_codes_of_other_weights_are_refused(frozen: bool) -> None:
    module, other = attention(name="plain"), attention(name="other-widths")
    fxquant.freeze(other)
    if frozen:
        fxquant.freeze(module)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_proj_weight_codes"):
        module.load_state_dict(other.state_dict())
