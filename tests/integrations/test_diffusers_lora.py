"""peft adapters on quantized models of a pipeline: loaded, trained, swapped, merged into codes, unmerged, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.errors import FrozenWeight
from tests.integrations.marks import MARKS
from tests.integrations.small_pipelines import made, picture

diffusers: Any = pytest.importorskip("diffusers")
peft: Any = pytest.importorskip("peft")
pytestmark = [
    *MARKS,
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # a second adapter
]

TARGETS = ["to_q", "to_k", "to_v", "proj_out"]


def quantized(preset: str = "int8wo") -> Any:
    pipe = made("sd3")
    pipe.transformer = fxquant.QuantizedDiffusersModel.quantize(pipe.transformer, preset)
    return pipe


def adapter(seed: int, folder: Path) -> Path:
    """An adapter of the float pipeline, in a folder of its own, that changes the picture a good deal."""
    pipe = made("sd3")
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(folder / str(seed), transformer_lora_layers=layers)
    return folder / str(seed)


def sqnr(wanted: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10((wanted**2).mean() / ((wanted - got) ** 2).mean()))


def codes(pipe: Any) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in pipe.transformer.state_dict().items() if key.endswith("_codes")}


def test_adapters_are_loaded_swapped_and_unloaded(tmp_path: Path) -> None:
    pipe, plain = quantized(), made("sd3")
    bare = picture(pipe, "sd3")
    images = {}
    for name in ("first", "second"):
        folder = adapter(len(name), tmp_path)
        for one in (pipe, plain):
            one.load_lora_weights(folder, adapter_name=name)
            one.set_adapters([name])
        images[name] = picture(pipe, "sd3")
        assert sqnr(picture(plain, "sd3"), images[name]) > 30
    assert sqnr(images["first"], images["second"]) < 25
    pipe.set_adapters(["first"])
    assert torch.equal(picture(pipe, "sd3"), images["first"])
    pipe.disable_lora()
    assert torch.equal(picture(pipe, "sd3"), bare)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe, "sd3"), bare)


@pytest.mark.parametrize("compile_it", [False, True])
def test_an_adapter_is_merged_into_codes_and_out_again(compile_it: bool, tmp_path: Path) -> None:
    from fxquant.integrations.diffusers_lora import let_lora_merge

    pipe = quantized()
    if compile_it:
        fxquant.compile_pipeline(pipe, components=["transformer"], executor="eager")
    bare = picture(pipe, "sd3")
    pipe.load_lora_weights(adapter(1, tmp_path))
    beside, before = picture(pipe, "sd3"), codes(pipe)
    with pytest.raises(FrozenWeight):
        pipe.fuse_lora()
    assert let_lora_merge(pipe) > 5
    assert let_lora_merge(pipe) == 0
    pipe.fuse_lora()
    merged = codes(pipe)
    assert any(not torch.equal(merged[key], before[key]) for key in before)
    assert sqnr(beside, picture(pipe, "sd3")) > 30
    assert sqnr(bare, picture(pipe, "sd3")) < 25
    pipe.unfuse_lora()
    assert all(torch.equal(tensor, before[key]) for key, tensor in codes(pipe).items())
    torch.testing.assert_close(picture(pipe, "sd3"), beside, rtol=0, atol=1e-4 if compile_it else 0)


def test_an_adapter_is_trained_on_a_quantized_model() -> None:
    pipe = quantized("int4wo")
    before = codes(pipe)
    model = pipe.transformer
    model.requires_grad_(False)
    model.add_adapter(fxquant.peft_config(peft.LoraConfig(r=4, target_modules=TARGETS)))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > 10
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 6, 128),
        "pooled_projections": torch.randn(2, 128),
        "timestep": torch.tensor([1.0, 500.0]),
    }
    wanted = torch.randn(2, 4, 4, 4)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(**inputs).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(tensor, before[key.replace(".base_layer", "")]) for key, tensor in codes(pipe).items())
    model.fuse_lora()
    with torch.no_grad():
        assert (model(**inputs).sample - wanted).square().mean() < losses[0]
