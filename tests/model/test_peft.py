"""LoRA by peft around quantized modules: it trains, and a merge changes the outputs or is refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import FrozenWeight, MergeRefused

peft: Any = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.first = nn.Linear(64, 32)
        self.conv = nn.Conv2d(2, 3, 3)
        self.last = nn.Linear(32, 8)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """tokens [B, T], image [B, 2, H, W] -> [B, 8]"""
        return self.last(torch.relu(self.first(self.table(tokens).mean(1)))) + self.conv(image).mean((1, 2, 3))[:, None]


def quantized(weights: str = "int8", *, frozen: bool = True, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    fxquant.quantize(model, weights=weights, rules={"table": f"w={weights}/channel"}, **options)
    if frozen:
        fxquant.freeze(model)
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (4, 5), generator=generator)
    return tokens, torch.randn(4, 2, 8, 8, generator=generator)


def config(*targets: str, **options: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)


def trained(model: nn.Module, lora: Any, steps: int = 15) -> Any:
    """The model with adapters that some steps have moved from 0."""
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, lora)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (wrapped(*data()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    return wrapped.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(*data())


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "weight_codes" in name}


ALL = ("first", "last", "conv", "table")


@pytest.mark.parametrize("targets", [("first", "last"), ("conv",), ("table",), ALL])
@pytest.mark.parametrize("frozen", [True, False])
def test_adapters_train_with_and_without_the_helper(targets: tuple[str, ...], frozen: bool) -> None:
    plain = trained(quantized(frozen=frozen), config(*targets))
    ours = trained(quantized(frozen=frozen), fxquant.peft_config(config(*targets)))
    assert torch.equal(outputs(plain), outputs(ours))
    adapters = sum("lora_" in name for name, _ in ours.named_parameters())
    assert adapters == 2 * len(targets)


@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
@pytest.mark.parametrize("targets", [("first", "last"), ("conv",), ("table",), ALL])
def test_merging_changes_the_weights_truly(weights: str, targets: tuple[str, ...]) -> None:
    """Merged weights are those of quantizing the sum anew: outputs are near those with the adapters beside."""
    wrapped = trained(quantized(weights), fxquant.peft_config(config(*targets)))
    beside, before = outputs(wrapped), codes(wrapped)
    with wrapped.disable_adapter():
        without = outputs(wrapped)
    layers: dict[str, Any] = {n: m for n, m in wrapped.named_modules() if hasattr(m, "merged_adapters")}
    wanted = {}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        total = base.weight + layer.get_delta_weight("default")
        spec = base.quantized_weight().spec
        wanted[name] = fxquant.QuantizedTensor.quantize(base.matrix(total), spec).dequantize()
    wrapped.merge_adapter()
    merged = outputs(wrapped)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        assert torch.equal(base.matrix(base.weight + 0), wanted[name])
    assert (merged - beside).norm() < 0.5 * (merged - without).norm()
    wrapped.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in codes(wrapped).items())
    assert torch.equal(outputs(wrapped), beside)


def test_a_safe_merge_and_several_adapters() -> None:
    wrapped = trained(quantized(), fxquant.peft_config(config("first", lora_bias=True)))
    wrapped.add_adapter("other", fxquant.peft_config(config("first", init_lora_weights=False)))
    wrapped.base_model.set_adapter(["default", "other"])
    beside, bias = outputs(wrapped), wrapped.base_model.model.first.base_layer.bias.clone()
    wrapped.merge_adapter(safe_merge=True)
    assert wrapped.base_model.model.first.merged_adapters == ["default", "other"]
    assert (outputs(wrapped) - beside).norm() < 0.05 * beside.norm()
    assert not torch.equal(wrapped.base_model.model.first.base_layer.bias, bias)
    wrapped.unmerge_adapter()
    assert torch.equal(outputs(wrapped), beside)
    assert torch.equal(wrapped.base_model.model.first.base_layer.bias, bias)


def test_nan_in_an_adapter_is_refused_by_a_safe_merge() -> None:
    wrapped = trained(quantized(), fxquant.peft_config(config("first")))
    with torch.no_grad():
        wrapped.base_model.model.first.lora_A["default"].weight[0, 0] = float("nan")
    before = codes(wrapped)
    with pytest.raises(MergeRefused, match="the delta of default holds NaN"):
        wrapped.merge_adapter(safe_merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codes(wrapped).items())


def test_merge_and_unload_gives_the_frozen_model_with_new_codes() -> None:
    wrapped = trained(quantized(), fxquant.peft_config(config(*ALL)))
    beside = outputs(wrapped)
    plain = wrapped.merge_and_unload()
    assert isinstance(plain, Net)
    assert isinstance(plain.first, fxquant.QModule)
    assert plain.first.is_frozen
    assert (outputs(plain) - beside).norm() < 0.05 * beside.norm()


@pytest.mark.parametrize("target", ALL)
def test_peft_without_the_helper_does_not_lose_a_merge_silently(target: str) -> None:
    wrapped = trained(quantized(), config(target))
    beside, before = outputs(wrapped), codes(wrapped)
    with pytest.raises(FrozenWeight, match=f"Q{'Linear' if target in ('first', 'last') else ''}"):
        wrapped.merge_adapter()
    assert torch.equal(outputs(wrapped), beside)
    with pytest.raises(FrozenWeight):
        wrapped.merge_adapter(safe_merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codes(wrapped).items())


@pytest.mark.parametrize("helper", [True, False])
def test_weights_that_are_not_frozen_merge_as_floats(helper: bool) -> None:
    lora = config("first")
    wrapped = trained(quantized("int4", frozen=False), fxquant.peft_config(lora) if helper else lora)
    layer = wrapped.base_model.model.first
    wanted = layer.base_layer.weight + layer.get_delta_weight("default")
    wrapped.merge_adapter()
    assert torch.equal(layer.base_layer.weight, wanted)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight + layer.get_delta_weight("default"), wanted)


def test_an_adapter_that_is_no_delta_trains_and_is_not_merged() -> None:
    wrapped = trained(quantized(), fxquant.peft_config(config("first", use_dora=True)))
    with pytest.raises(MergeRefused, match=r"DoraLinearVariant: no plain delta\. Nothing has been merged"):
        wrapped.merge_adapter()


def test_a_tied_weight_is_not_merged_into_from_one_side() -> None:
    model = Net()
    model.last = nn.Linear(64, 20, bias=False)
    model.last.weight = model.table.weight
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    model.forward = lambda tokens, image: model.last(model.table(tokens).mean(1))
    wrapped = trained(model, fxquant.peft_config(config("table")))
    with pytest.raises(MergeRefused, match="another module's too"):
        wrapped.merge_adapter()


def test_a_transposed_linear_merges() -> None:
    conv1d: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = conv1d(8, 64)

        def forward(self, x: Tensor, _: Tensor) -> Tensor:
            return self.first(x.float() @ torch.ones(5, 64))

    torch.manual_seed(0)
    model = Transposed()
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    wrapped = trained(model, fxquant.peft_config(config("first", fan_in_fan_out=True)))
    beside = outputs(wrapped)
    wrapped.merge_adapter()
    assert (outputs(wrapped) - beside).norm() < 0.05 * beside.norm()


def test_copies_and_pickles_keep_their_way_to_merge() -> None:
    wrapped = trained(quantized(), fxquant.peft_config(config("first")))
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        beside = outputs(twin)
        twin.merge_adapter()
        assert not torch.equal(outputs(twin), beside)
        twin.unmerge_adapter()
        assert torch.equal(outputs(twin), beside)
    assert wrapped.base_model.model.first.merged_adapters == []


def test_the_adapters_alone_are_saved_and_loaded(tmp_path: Any) -> None:
    wrapped = trained(quantized(), fxquant.peft_config(config("first", "last")))
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path).eval()
    assert torch.equal(outputs(again), outputs(wrapped))
    with pytest.raises(FrozenWeight):
        again.merge_adapter()  # loaded without the helper
    lora = fxquant.peft_config(peft.LoraConfig.from_pretrained(tmp_path))
    ours = peft.PeftModel.from_pretrained(quantized(), tmp_path, config=lora).eval()
    ours.merge_adapter()
    assert (outputs(ours) - outputs(wrapped)).norm() < 0.05 * outputs(wrapped).norm()
