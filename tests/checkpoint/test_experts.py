"""A model with experts, whose frozen weights are stacked, one matrix for each, comes back from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import fxquant
from fxquant.errors import InvalidCheckpoint
from tests.checkpoint.folders import contents

EXPERTS = "model.layers.0.mlp.experts"
PRESETS = ["int8dq", "int4dq", "int4wo", "int8wo", "nvfp4"]
IDS = torch.arange(12).view(2, 6)


def mixtral() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 192, "num_hidden_layers": 1, "vocab_size": 50}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def on_meta() -> Any:
    with torch.device("meta"):
        return mixtral()


def small(preset: str) -> Any:
    torch.manual_seed(0)
    model = mixtral()
    fxquant.quantize(model, preset)
    fxquant.freeze(model)
    assert isinstance(model.get_submodule(EXPERTS), fxquant.nn.QExperts)
    return model


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


WAYS: dict[str, Callable[[Path], nn.Module]] = {
    "model": lambda folder: fxquant.load(folder, model=mixtral()),
    "meta model": lambda folder: fxquant.load(folder, model=on_meta()),
    "factory": lambda folder: fxquant.load(folder, factory=mixtral),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", PRESETS)
def test_experts_come_back_bit_equal(preset: str, way: str, tmp_path: Path) -> None:
    model = small(preset)
    fxquant.save(model, tmp_path / "q")
    loaded = WAYS[way](tmp_path / "q")
    assert torch.equal(answer(loaded), answer(model))
    assert fxquant.quantization_map(loaded) == fxquant.quantization_map(model)
    assert fxquant.memory_footprint(loaded) == fxquant.memory_footprint(model)
    fxquant.save(loaded, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "q")


@pytest.mark.parametrize("preset", ["int8dq", "int4dq"])
def test_experts_come_back_from_shards(preset: str, tmp_path: Path) -> None:
    model = small(preset)
    fxquant.save(model, tmp_path / "q", max_shard_size="10KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    assert torch.equal(answer(fxquant.load(tmp_path / "q", factory=mixtral)), answer(model))


@pytest.mark.parametrize("preset", PRESETS)
def test_experts_come_back_in_bfloat16(preset: str, tmp_path: Path) -> None:
    model = small(preset)
    fxquant.save(model, tmp_path / "q")
    loaded: Any = fxquant.load(tmp_path / "q", factory=mixtral, dtype=torch.bfloat16)
    angles = model.model.rotary_emb.inv_freq  # no state dict holds it, and load does not round it
    model.to(torch.bfloat16).model.rotary_emb.inv_freq = angles
    assert answer(loaded).dtype is torch.bfloat16
    assert torch.equal(answer(loaded), answer(model))
    fxquant.save(model, tmp_path / "half")
    assert torch.equal(answer(fxquant.load(tmp_path / "half", factory=mixtral)), answer(model))


def other_letter(spec: Tensor) -> Tensor:
    spec = spec.clone()
    spec[2, 3] += 1
    return spec


EDITS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "one expert's spec is another": other_letter,
    "a shorter text": lambda spec: spec[:, :-1].contiguous(),
    "no experts": lambda spec: spec[:0],
    "one dimension more": lambda spec: spec.unsqueeze(0),
    "another dtype": lambda spec: spec.to(torch.int8),
    "a number": lambda spec: spec[0, 0].clone(),
    "not there": lambda spec: None,
}


@pytest.mark.parametrize("name", EDITS)
def test_specs_that_lie_are_named(name: str, tmp_path: Path) -> None:
    fxquant.save(small("int4dq"), tmp_path / "q")
    file, key = tmp_path / "q/model.safetensors", f"{EXPERTS}.gate_up_proj_spec"
    tensors = load_file(file)
    assert tensors[key].shape[0] == 4
    edited = EDITS[name](tensors.pop(key))
    save_file(tensors if edited is None else tensors | {key: edited}, file, {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"experts.gate_up_proj.* is int4/group32/stepped"):
        fxquant.load(tmp_path / "q", factory=mixtral)


def test_specs_of_fewer_experts_are_refused(tmp_path: Path) -> None:
    fxquant.save(small("int4dq"), tmp_path / "q")
    file, key = tmp_path / "q/model.safetensors", f"{EXPERTS}.down_proj_spec"
    tensors = load_file(file)
    save_file(tensors | {key: tensors[key][:3].clone()}, file, {"format": "pt"})
    with pytest.raises(fxquant.errors.StateDictMismatch, match="parts of 4 experts"):
        fxquant.load(tmp_path / "q", factory=mixtral)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_linear_layer_has_one_spec(rows: int, tmp_path: Path) -> None:
    fxquant.save(small("int4dq"), tmp_path / "q")
    file, key = tmp_path / "q/model.safetensors", "model.layers.0.self_attn.q_proj.weight_spec"
    tensors = load_file(file)
    assert tensors[key].dim() == 1
    save_file(tensors | {key: tensors[key].repeat(rows, 1)}, file, {"format": "pt"})
    with pytest.raises(fxquant.errors.FxQuantError, match="q_proj"):
        fxquant.load(tmp_path / "q", factory=mixtral)
