"""Experts of routers, whose weights are stacked: saved, and loaded bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import fxquant
from fxquant.errors import InvalidCheckpoint
from fxquant.nn import QExperts
from tests.checkpoint.folders import IDS

PRESETS = ("int8wo", "int8dq", "int4wo", "int4dq", "fp8wo", "nvfp4", "fp6_e3m2", "w=int4/group32/stepped x=int8/group32")


def mixtral(seed: int = 1, dtype: torch.dtype | None = None) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=128, max_position_embeddings=32)
    ).to(dtype or torch.float32)


def quantized(config: str, dtype: torch.dtype | None = None) -> MixtralForCausalLM:
    model = mixtral(0, dtype)
    fxquant.quantize(model, config)
    fxquant.freeze(model)
    assert any(isinstance(module, QExperts) for module in model.modules())
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("config", PRESETS)
def test_experts_come_back_bit_equal(config: str, tmp_path: Path) -> None:
    model = quantized(config)
    fxquant.save(model, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", factory=mixtral)
    assert torch.equal(logits(loaded), logits(model))
    assert fxquant.quantization_map(loaded) == fxquant.quantization_map(model)


def test_into_a_model_on_meta_from_many_shards(tmp_path: Path) -> None:
    model = quantized("int8dq")
    fxquant.save(model, tmp_path / "q", max_shard_size="40KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    with torch.device("meta"):
        bare = mixtral()
    loaded = fxquant.load(tmp_path / "q", model=bare, device="cpu")
    assert torch.equal(logits(loaded), logits(model))


def test_onto_another_compute_dtype(tmp_path: Path) -> None:
    model = quantized("int4dq")
    fxquant.save(model, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", model=mixtral(), dtype=torch.bfloat16)
    model.to(torch.bfloat16).model.rotary_emb = loaded.model.rotary_emb  # whose frequencies .to() rounds
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_loads_its_own_folder_bit_equal(tmp_path: Path) -> None:
    mixtral(0).save_pretrained(tmp_path / "float")
    config = fxquant.FxQuantConfig("int8dq")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "q")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "q")
    assert any(isinstance(module, QExperts) for module in again.modules())
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("change", ["one expert", "a dimension"])
def test_a_spec_that_was_changed_is_refused(change: str, tmp_path: Path) -> None:
    fxquant.save(quantized("int8dq"), tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("gate_up_proj_spec"))
    if change == "one expert":
        tensors[key][2, 0] = ord("u")
    else:
        tensors[key] = tensors[key][None]
    save_file(tensors, file)
    with pytest.raises(InvalidCheckpoint, match="gate_up_proj"):
        fxquant.load(tmp_path / "q", factory=mixtral)
