"""Quanto's method names, whole folders with a card, and `fxquant quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fxquant
from fxquant.cli import app
from fxquant.errors import InvalidCheckpoint, NotAModule, NothingQuantized, SaveFailed
from tests.integrations.small_models import answer, made, model_class, saved

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quiet")


def helper() -> Any:
    from fxquant import QuantizedModelForCausalLM

    return QuantizedModelForCausalLM


# ---- Quanto's names


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_model_is_quantized_saved_and_loaded_by_quantos_names(name: str, tmp_path: Path) -> None:
    model = helper().quantize(made(name), weights="qint4", exclude="model.layers.0.*", device="cpu")
    assert type(model) is model_class(name)
    assert model.lm_head.is_frozen
    model.save_pretrained(tmp_path / "plain")
    helper().save_pretrained(model, tmp_path / "whole")
    for folder in ("plain", "whole"):
        again = helper().from_pretrained(tmp_path / folder)
        assert torch.equal(answer(again), answer(model))
        assert not isinstance(again.model.layers[0].mlp.up_proj, fxquant.QModule)


def test_what_is_no_quantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="quantization_config"):
        helper().from_pretrained(saved("llama", tmp_path / "float"))
    with pytest.raises(NotAModule):
        helper().quantize("llama")
    with pytest.raises(NothingQuantized):
        helper().save_pretrained(made("llama"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_float_weights_in_training_are_saved_as_such(tmp_path: Path) -> None:
    from fxquant.integrations.transformers import attach

    model = made("tied")
    fxquant.quantize(model, "int8wo")
    attach(model, "int8wo").save_pretrained(tmp_path)
    again = model_class("tied").from_pretrained(tmp_path)
    assert not again.lm_head.is_frozen
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(answer(again), answer(model))
    fxquant.freeze(again)
    fxquant.freeze(model)
    assert torch.equal(answer(again), answer(model))


# ---- whole folders


def test_a_card_says_what_must_be_imported_and_keeps_what_it_said(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"never read")
    model = helper().quantize(made("llama"), "int4wo")
    folder = tmp_path / "int4"
    from fxquant.integrations.transformers_saving import save_pretrained

    save_pretrained(model, folder, source=source)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n")
    assert "from fxquant import FxQuantConfig" in card
    assert "random weights" in card
    assert "AutoModelForCausalLM" in card
    assert card.rstrip().endswith("# A model")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


def test_an_old_folder_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helper().quantize(made("llama"), "int4wo")
    folder = tmp_path / "int4"
    helper().save_pretrained(model, folder, max_shard_size="40KB")
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
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert list(tmp_path.iterdir()) == [folder]


# ---- the command


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["quantize", *map(str, words)])


def test_the_command_makes_the_model_that_the_library_makes(tmp_path: Path) -> None:
    source, target = saved("tied", tmp_path / "float"), tmp_path / "int4"
    done = run(source, target, "--preset", "int4wo", "--rule", "*.mlp.*=int8wo", "--exclude", "model.layers.1.*")
    assert done.exit_code == 0, done.output
    assert "modules quantized" in done.output
    wanted = model_class("tied").from_pretrained(source)
    fxquant.quantize(wanted, "int4wo", rules=[("*.mlp.*", "int8wo")], exclude="model.layers.1.*")
    fxquant.freeze(wanted)
    assert torch.equal(answer(helper().from_pretrained(target)), answer(wanted))
    again = run(source, target, "--preset", "int8wo")
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    assert run(source, target, "--preset", "int8wo", "--overwrite").exit_code == 0
    assert json.loads((target / "config.json").read_text())["quantization_config"]["preset"] == "int8wo"
    twice = run(target, tmp_path / "twice")
    assert twice.exit_code == 2
    assert "quantized already" in twice.output


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "No such file"),
        ("{", "JSON"),
        ('{"architectures": ["NoSuchModel"]}', "NoSuchModel"),
        ('{"architectures": []}', "architectures"),
    ],
)
def test_a_folder_that_is_no_model_is_named(config: str | None, words: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    done = run(tmp_path, tmp_path / "out")
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "out").exists()
