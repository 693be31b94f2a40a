"""Quanto's method names for models of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.errors import InvalidCheckpoint, NotAModule, NothingQuantized, SaveFailed
from tests.integrations.marks import MARKS
from tests.integrations.small_pipelines import made

diffusers: Any = pytest.importorskip("diffusers")
pytestmark = MARKS


def helper() -> Any:
    return fxquant.QuantizedDiffusersModel


@pytest.mark.parametrize("subclass", [True, False])
def test_a_model_is_quantized_saved_and_loaded_by_quantos_names(subclass: bool, tmp_path: Path) -> None:
    names = helper()
    if subclass:
        names = type("QuantizedPixArt", (names,), {"base_class": diffusers.PixArtTransformer2DModel})
    plain = made("pixart_sigma").transformer
    model = names.quantize(plain, weights="qint8", exclude=["proj_out"])
    assert model is plain
    assert not isinstance(model.proj_out, fxquant.QModule)
    model.save_pretrained(tmp_path / "plain")
    names.save_pretrained(model, tmp_path / "whole")
    for folder in ("plain", "whole"):
        again = names.from_pretrained(tmp_path / folder)
        assert type(again) is diffusers.PixArtTransformer2DModel
        state = model.state_dict()
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "from fxquant import FxQuantConfig" in card
    assert "PixArtTransformer2DModel" in card


def test_what_is_no_quantized_model_is_refused(tmp_path: Path) -> None:
    model = made("pixart_sigma").transformer
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(InvalidCheckpoint, match="quantization_config"):
        helper().from_pretrained(tmp_path / "float")
    with pytest.raises(NotAModule):
        helper().quantize(torch.nn.Linear(2, 2))
    with pytest.raises(NothingQuantized):
        helper().save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_old_folder_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helper().quantize(made("pixart_sigma").transformer, "int8wo")
    folder = tmp_path / "int8"
    helper().save_pretrained(model, folder, max_shard_size="60KB")
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", full)
        with pytest.raises(SaveFailed, match="No space left"):
            helper().save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    helper().save_pretrained(model, folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "notes.txt"}
