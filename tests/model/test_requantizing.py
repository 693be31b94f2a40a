"""quantization_map and requantize: a model from its map and state dict, whole or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import AlreadyFrozen, BuffersOnMeta, InvalidQuantizationMap, StateDictMismatch


class Net(nn.Module):
    """A table tied to the last linear, a norm with a persistent buffer, a shared linear, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.norm = nn.BatchNorm1d(64)
        self.shared = nn.Linear(64, 64)
        self.again = self.shared
        self.head = nn.Linear(64, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, 30]"""
        x = self.norm(self.conv(self.table(tokens).mT)).mT
        return self.head(self.again(self.shared(x)))


TOKENS = torch.arange(24).reshape(2, 12)
CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8", "activations": "int8"},
    "int4": {"weights": "qint4", "group_size": 32},
    "float8": {"weights": "qfloat8_e5m2"},
    "mxfp4": {"weights": "mxfp4"},
    "nvfp4": {"weights": "nvfp4"},
    "mixed": {"weights": "int8", "rules": {"conv": "w=int4/group32/shift/bf16", "shared": "w=fp6_e2m3/channel"}},
}


def quantized(config: dict[str, Any], *, frozen: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    fxquant.quantize(model, **config)
    if frozen:
        fxquant.freeze(model)
    return model


def skeleton(*, meta: bool = False) -> Net:
    """Another model's weights, or none."""
    torch.manual_seed(9)
    if not meta:
        return Net().eval()
    with torch.device("meta"):
        return Net().eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_comes_back_from_json_and_a_state_dict(name: str, meta: bool, frozen: bool) -> None:
    model = quantized(CONFIGS[name], frozen=frozen)
    text = json.dumps(fxquant.quantization_map(model))
    again = skeleton(meta=meta)
    fxquant.requantize(again, model.state_dict(), json.loads(text))
    assert torch.equal(outputs(again), outputs(model))
    assert fxquant.quantization_map(again) == json.loads(text)
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert fxquant.memory_footprint(again) == fxquant.memory_footprint(model)


def test_the_map_says_all_that_rebuilds_a_module() -> None:
    found = fxquant.quantization_map(quantized(CONFIGS["int8"] | {"algorithm": "mse"}))
    assert found == {
        "table": {
            "weights": "int8/channel",
            "activations": "none",
            "algorithm": "mse",
            "calibratable": "no",
            "tied_to": "head",
        },
        "conv": {"weights": "int8/channel", "activations": "int8/sample", "algorithm": "mse", "calibratable": "yes"},
        "shared": {"weights": "int8/channel", "activations": "int8/token", "algorithm": "mse", "calibratable": "yes"},
        "head": {"weights": "int8/channel", "activations": "int8/token", "algorithm": "mse", "calibratable": "yes"},
    }


def test_a_root_module_has_the_empty_path() -> None:
    linear: Any = nn.Linear(8, 4)
    fxquant.quantize(linear, weights="int8")
    fxquant.freeze(linear)
    again = nn.Linear(8, 4)
    fxquant.requantize(again, linear.state_dict(), fxquant.quantization_map(linear), device="cpu")
    assert torch.equal(again(torch.eye(8)), linear(torch.eye(8)))


def test_ties_and_shared_modules_stay() -> None:
    model = quantized(CONFIGS["int8"])
    again: Any = skeleton(meta=True)
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert again.again is again.shared
    assert again.table._holder() is again.head
    assert not any(key.startswith("table.") for key in again.state_dict())


def test_a_model_whose_weights_are_not_tied_becomes_tied() -> None:
    model, again = quantized(CONFIGS["int8"]), skeleton()
    again.head.weight = nn.Parameter(torch.zeros(30, 64))
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert torch.equal(outputs(again), outputs(model))


def test_calibrated_scales_come_back_and_absent_ones_go() -> None:
    model = quantized(CONFIGS["int8"])
    without = outputs(model)
    state = model.state_dict()
    with fxquant.Calibration(), torch.no_grad():
        model(TOKENS)
    assert not torch.equal(outputs(model), without)
    again: Any = skeleton()
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert torch.equal(outputs(again), outputs(model))
    fxquant.requantize(again, state, fxquant.quantization_map(model))
    assert again.shared.input_scale is None
    assert torch.equal(outputs(again), without)


def test_a_skeleton_in_another_dtype_keeps_it() -> None:
    model, again = quantized(CONFIGS["int8"]), skeleton().to(torch.bfloat16)
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert outputs(again).dtype is torch.bfloat16
    assert (outputs(again).float() - outputs(model)).norm() < 0.05 * outputs(model).norm()


def test_what_the_module_was_stays() -> None:
    model, again = quantized(CONFIGS["int8"]), skeleton().train()
    calls: list[str] = []
    again.shared.register_forward_hook(lambda *_: calls.append("hook"))
    again.shared.bias.requires_grad_(False)
    before = again.shared.bias
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    outputs(again)
    assert calls == ["hook", "hook"]
    assert again.shared.training
    assert again.shared.bias is before
    assert not before.requires_grad


def _without(*keys: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: [state.pop(key) for key in keys]


def _with(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.update({key: tensor})


STATES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "codes missing": (_without("conv.weight_codes", "conv.weight_scale", "conv.weight_spec"), "missing: 'conv.weight'"),
    "codes alone missing": (_without("conv.weight_codes"), "missing: 'conv.weight_codes'"),
    "scale missing": (_without("conv.weight_scale"), "missing: 'conv.weight_scale'"),
    "bias missing": (_without("conv.bias"), "missing: 'conv.bias'"),
    "buffer missing": (_without("norm.running_mean"), "missing: 'norm.running_mean'"),
    "unexpected": (_with("other.weight", torch.zeros(1)), "unexpected: 'other.weight'"),
    "codes unexpected": (_with("norm.weight_codes", torch.zeros(1)), "unexpected: 'norm.weight_codes'"),
    "zero points unexpected": (
        _with("conv.weight_zero_point", torch.zeros(64, 1)),
        "unexpected: 'conv.weight_zero_point'",
    ),
    "float and codes": (_with("conv.weight", torch.zeros(64, 64, 3)), "unexpected: 'conv.weight'"),
    "bias of another shape": (
        _with("conv.bias", torch.zeros(7)),
        r"wrong: .conv.bias is \(7,\), the model's is \(64,\)",
    ),
    "codes of another shape": (
        _with("conv.weight_codes", torch.zeros(64, 7, dtype=torch.uint8)),
        "wrong: .conv.weight",
    ),
    "scales of another shape": (_with("conv.weight_scale", torch.zeros(7, 1)), "wrong: .conv.weight"),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("meta", [False, True])
def test_a_wrong_state_dict_is_named_and_changes_nothing(name: str, meta: bool) -> None:
    change, words = STATES[name]
    model, again = quantized(CONFIGS["int8"]), skeleton(meta=meta)
    state, before = dict(model.state_dict()), {key: t.clone() for key, t in again.state_dict().items()}
    change(state)
    with pytest.raises(StateDictMismatch, match=words):
        fxquant.requantize(again, state, fxquant.quantization_map(model))
    assert not any(isinstance(module, fxquant.QModule) for module in again.modules())
    assert list(again.state_dict()) == list(before)
    assert meta or all(torch.equal(again.state_dict()[key], before[key]) for key in before)
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert torch.equal(outputs(again), outputs(model))


MAPS: dict[str, tuple[Any, str]] = {
    "empty": ({}, "it is empty: nothing would be quantized"),
    "not a map": (["conv"], "it is empty"),
    "no such module": ({"cnov": {"weights": "int8/channel"}}, "'cnov': the model has no module of that name"),
    "no such kind": ({"norm": {"weights": "int8/channel"}}, "'norm': BatchNorm1d has no quantized class"),
    "no such spec": ({"conv": {"weights": "int9/channel"}}, "'conv': unknown number format 'int9'"),
    "no such field": ({"conv": {"weight": "int8/channel"}}, r"'conv': its fields are weights, .*not \['weight'\]"),
    "nothing": ({"conv": {"weights": "none", "activations": "none"}}, "'conv': neither weights nor activations"),
    "tied to nothing": ({"table": {"weights": "int8/channel", "tied_to": "haed"}}, "'table': it is tied to 'haed'"),
    "two specs": (
        {"shared": {"weights": "int8/channel"}, "again": {"weights": "int4/channel"}},
        "'again': the same module as 'shared'",
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_wrong_map_is_named_and_changes_nothing(name: str) -> None:
    given, words = MAPS[name]
    model, again = quantized(CONFIGS["int8"]), skeleton()
    before = outputs(again)
    with pytest.raises(InvalidQuantizationMap, match=words):
        fxquant.requantize(again, model.state_dict(), given)
    assert torch.equal(outputs(again), before)


def test_a_quantized_module_that_the_map_leaves_out_is_named() -> None:
    model = quantized(CONFIGS["int8"])
    part = {path: fields for path, fields in fxquant.quantization_map(model).items() if path != "conv"}
    with pytest.raises(InvalidQuantizationMap, match="'conv' is quantized as w=int8/channel x=int8/sample"):
        fxquant.requantize(quantized(CONFIGS["int8"]), model.state_dict(), part)


def test_codes_of_another_kind_are_not_replaced() -> None:
    model = quantized(CONFIGS["int8"])
    with pytest.raises(AlreadyFrozen):
        fxquant.requantize(quantized(CONFIGS["float8"]), model.state_dict(), fxquant.quantization_map(model))


def test_the_state_dict_is_copied_from() -> None:
    model, again = quantized(CONFIGS["int8"]), skeleton(meta=True)
    state = model.state_dict()
    fxquant.requantize(again, state, fxquant.quantization_map(model))
    before = outputs(again)
    for tensor in state.values():
        tensor.fill_(1)
    assert torch.equal(outputs(again), before)


class Buffers(nn.Module):
    """A linear beside a non-persistent buffer, and an ordinary attribute, that only the model can compute."""

    steps: Tensor
    mask: Tensor

    def __init__(self, *, knows: bool = True, attribute: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.knows = knows
        self.register_buffer("steps", torch.arange(8.0), persistent=False)
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool), persistent=False)
        if attribute:
            self.table = torch.full((8,), 2.0)

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, Buffers):
            if self.knows:
                module.steps.copy_(torch.arange(8.0))
            module.mask.fill_(True)
            module.linear.weight.fill_(5.0)  # of a copy: the model's own keeps what it has
            if "table" in module.__dict__:
                module.table.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.steps * self.mask * self.__dict__.get("table", 1)


@pytest.mark.parametrize("attribute", [False, True])
def test_buffers_of_no_state_dict_are_computed_by_the_model(attribute: bool) -> None:
    model = Buffers(attribute=attribute)
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    with torch.device("meta"):
        again = Buffers(attribute=attribute)
        fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert torch.equal(again.steps, torch.arange(8.0))
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))


def test_buffers_that_nobody_computes_are_named() -> None:
    model = Buffers(knows=False)
    fxquant.quantize(model, weights="int8")
    with torch.device("meta"):
        again = Buffers(knows=False)
    with pytest.raises(BuffersOnMeta, match=r"^'steps': on the meta device, .*init_empty_weights\(\)"):
        fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert type(again.linear) is nn.Linear
    assert again.linear.weight.is_meta
    nested: Any = nn.Sequential(copy.deepcopy(again))
    nested[0]._init_weights = None
    state = {f"0.{key}": tensor for key, tensor in model.state_dict().items()}
    with pytest.raises(BuffersOnMeta, match=r"'0\.(steps', '0\.mask|mask', '0\.steps)'"):
        fxquant.requantize(nested, state, {"0.linear": {"weights": "int8/channel"}})


def test_a_meta_llama_gives_the_logits_of_the_original() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    with torch.device("meta"):
        again = transformers.LlamaForCausalLM(config).eval()
    assert again.model.rotary_emb.inv_freq.is_meta
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kdim", [None, 16])
def test_attention_comes_back(weights: str, kdim: int | None, meta: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim, batch_first=True)
    fxquant.quantize(model, weights=weights)
    fxquant.freeze(model)
    with torch.device("meta" if meta else "cpu"):
        again: Any = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim, batch_first=True)
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    x, y = torch.randn(2, 5, 32), torch.randn(2, 6, kdim or 32)
    with torch.no_grad():
        assert torch.equal(again(x, y, y)[0], model(x, y, y)[0])


@pytest.mark.parametrize("meta", [False, True])
def test_norms_with_rounded_outputs_come_back(meta: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    fxquant.quantize(model, weights="int8", rules={"1": "w=none x=int8/tensor"})
    fxquant.freeze(model)
    with fxquant.Calibration(), torch.no_grad():
        model(torch.randn(16, 8))
    found = fxquant.quantization_map(model)
    assert found["1"]["weights"] == "none"
    with torch.device("meta" if meta else "cpu"):
        again: Any = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    fxquant.requantize(again, model.state_dict(), found)
    assert again[1].output_scale is not None
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("meta", [False, True])
def test_experts_come_back(meta: bool) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, **heads)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    assert fxquant.quantize(model, weights="int8").linear_share >= 0.99
    fxquant.freeze(model)
    with torch.device("meta" if meta else "cpu"):
        again = transformers.MixtralForCausalLM(config).eval()
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_one_name_of_a_tied_float_weight_is_enough() -> None:
    model = quantized({"weights": "int8", "exclude": ["head", "table"]})
    state = {
        key: tensor for key, tensor in model.state_dict().items() if key != "head.weight"
    }  # as safetensors keeps it
    again = skeleton(meta=True)
    fxquant.requantize(again, state, fxquant.quantization_map(model))
    assert again.head.weight is again.table.weight
    assert torch.equal(outputs(again), outputs(model))


def test_a_search_for_lost_buffers_leaves_the_model_alone() -> None:
    model, again = Buffers(), Buffers(knows=False)
    fxquant.quantize(model, weights="int8")
    again.steps, again.mask = again.steps.to("meta"), again.mask.to("meta")
    before = again.linear.weight.detach().clone()
    with pytest.raises(BuffersOnMeta, match=r"^'steps':"):
        fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert torch.equal(again.linear.weight, before)
    assert again.steps.is_meta
    assert again.mask.is_meta
