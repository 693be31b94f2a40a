"""from_pretrained with FxQuantConfig in diffusers: what quantize and freeze make, and it comes back bit for bit."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.errors import InvalidQuantizationMap, NonFiniteWeight, PatternMatchesNothing, StateDictMismatch
from fxquant.nn import QModule
from tests.integrations.marks import MARKS
from tests.integrations.small_pipelines import CALLS, made, main_part, picture, saved

diffusers: Any = pytest.importorskip("diffusers")
pytestmark = MARKS

# Each pipeline once, and each recipe of the tables of diffusers-torchao.
RECIPES = {
    "pixart_sigma": ("int8wo", "fp8wo"),
    "sd3": ("int8dq", "fp4_e2m1"),
    "auraflow": ("int4wo",),
    "flux": ("int4dq", "fp8dqrow"),
    "cogvideox": ("fp8dq",),
    "sd": ("fp6_e3m2",),
    "sdxl": ("fp5_e2m2",),
}
CASES = [(name, recipe) for name, recipes in RECIPES.items() for recipe in recipes]
FRESH = """
import sys, warnings, torch
{first}
import diffusers
diffusers.utils.logging.set_verbosity_error()
{second}
model = diffusers.AutoModel.from_pretrained(sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
"""


def config(*args: Any, **fields: Any) -> Any:
    from fxquant import FxQuantConfig

    return FxQuantConfig(*args, **fields)


def quietly(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(folder: Path, **options: Any) -> Any:
    return quietly(diffusers.DiffusionPipeline.from_pretrained(folder, **options))


def auto(folder: Path, **options: Any) -> Any:
    return diffusers.AutoModel.from_pretrained(str(folder), **options)  # it takes no Path


def transformer(folder: Path, *args: Any, **fields: Any) -> Any:
    """The Flux transformer of a pipeline's folder, quantized while it is loaded."""
    made_of = config(*args, **fields)
    return diffusers.FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=made_of
    )


def same_codes(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---- pipelines


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_a_pipeline_is_quantized_while_it_is_loaded_saved_and_loaded(name: str, preset: str, tmp_path: Path) -> None:
    from diffusers.quantizers import PipelineQuantizationConfig

    from fxquant import FxQuantConfig  # noqa: F401

    wanted = made(name)
    main, _ = main_part(wanted)
    chosen = [main, "text_encoder"]
    for part in chosen:
        fxquant.quantize(getattr(wanted, part), preset)
        fxquant.freeze(getattr(wanted, part))
    how = PipelineQuantizationConfig(
        quant_backend="fxquant", quant_kwargs={"preset": preset}, components_to_quantize=chosen
    )
    pipe = loaded(saved(name, tmp_path / "float"), quantization_config=how)
    assert not any(isinstance(module, QModule) for module in pipe.vae.modules())
    assert fxquant.memory_footprint(getattr(pipe, main)) == fxquant.memory_footprint(getattr(wanted, main))
    assert same_codes(getattr(pipe, main), getattr(wanted, main))
    image = picture(pipe, name)
    assert torch.equal(image, picture(wanted, name))
    assert not torch.equal(image, picture(made(name), name))
    pipe.save_pretrained(tmp_path / "quantized")
    again = loaded(tmp_path / "quantized")
    assert type(again) is type(pipe)
    assert torch.equal(picture(again, name), image)


def test_each_component_has_its_own_recipe(tmp_path: Path) -> None:
    """The recipe for Stable Diffusion 3: of its text encoders only the third is large, and bears int8 weights."""
    from diffusers.quantizers import PipelineQuantizationConfig

    how = PipelineQuantizationConfig(
        quant_mapping={"transformer": config("int8dq", exclude="proj_out"), "text_encoder_3": config("int8wo")}
    )
    pipe = loaded(saved("sd3", tmp_path / "float"), quantization_config=how)
    assert str(pipe.transformer.transformer_blocks[0].attn.to_q.quantization) == str(fxquant.PRESETS["int8dq"])
    assert not isinstance(pipe.transformer.proj_out, QModule)
    for name, count in (("text_encoder", 0), ("text_encoder_2", 0), ("text_encoder_3", 7)):
        assert sum(isinstance(m, QModule) for m in getattr(pipe, name).modules()) == count
    float_image, image = picture(made("sd3"), "sd3"), picture(pipe, "sd3")
    assert 30 < sqnr(float_image, image) < 60  # 38 measured


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10((wanted**2).mean() / ((wanted - got) ** 2).mean()))


# ---- one component


def test_a_component_is_an_ordinary_folder(tmp_path: Path) -> None:
    model = transformer(saved("flux", tmp_path), "int4wo", exclude="proj_out")
    assert type(model) is diffusers.FluxTransformer2DModel
    assert not model.training
    assert len(model.hf_quantizer.report.quantized) == 29
    for folder in ("one", "two"):
        model.save_pretrained(tmp_path / folder, max_shard_size="60KB")
        model = auto(tmp_path / folder)
        assert not isinstance(model.proj_out, QModule)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.name != "config.json"}
    assert len(files) > 3
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir() if path.name in files}
    told = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("one", "two")]
    assert told[0]["quantization_config"] == told[1]["quantization_config"]
    assert told[0]["quantization_config"]["preset"] == "int4wo"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_keeps_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved("flux", tmp_path / "float") / "transformer"
    made_of = config("int8dq")
    model = auto(folder, quantization_config=made_of, torch_dtype=dtype)
    assert {model.proj_out.compute_dtype, model.dtype} == {dtype}
    model.save_pretrained(tmp_path / "saved")
    again = auto(tmp_path / "saved", torch_dtype=dtype)
    assert same_codes(again, model)
    x = torch.randn(3, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again.proj_out(x), model.proj_out(x))


def test_calibrated_activations_come_back(tmp_path: Path) -> None:
    pipe = made("pixart_sigma")
    recipe = {"weights": "int8", "activations": "int8"}
    pipe.transformer = auto(
        saved("pixart_sigma", tmp_path / "float") / "transformer", quantization_config=config(**recipe)
    )
    with fxquant.Calibration():
        picture(pipe, "pixart_sigma")
    image = picture(pipe, "pixart_sigma")
    pipe.transformer.save_pretrained(tmp_path / "saved")
    pipe.transformer = auto(tmp_path / "saved")
    assert pipe.transformer.proj_out.input_scale is not None
    assert torch.equal(picture(pipe, "pixart_sigma"), image)
    half = auto(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert half.proj_out.input_scale.dtype is torch.float32
    assert torch.equal(half.proj_out.input_scale, pipe.transformer.proj_out.input_scale)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_saved_as_the_copy_is(way: Any, tmp_path: Path) -> None:
    model = transformer(saved("flux", tmp_path / "float"), "int8wo", include="transformer_blocks.*")
    other = way(model)
    fxquant.quantize(other, "int8wo", include="single_transformer_blocks.*")
    fxquant.freeze(other)
    counts = []
    for one, folder in ((model, "model"), (other, "copy")):
        one.save_pretrained(tmp_path / folder)
        again = auto(tmp_path / folder)
        assert same_codes(again, one)
        counts.append(sum(isinstance(module, QModule) for module in again.modules()))
    assert 0 < counts[0] < counts[1]


@pytest.mark.parametrize("way", ["device_map", "disk"])
def test_device_maps(way: str, tmp_path: Path) -> None:
    folder = saved("flux", tmp_path / "float") / "transformer"
    wanted = transformer(tmp_path / "float", "int8wo")
    where: dict[str, Any] = {"": "cpu"}
    if way == "disk":
        where = {name: "cpu" for name, _ in wanted.named_children()} | {"single_transformer_blocks": "disk"}
    options = {"device_map": where, "offload_folder": str(tmp_path / "disk")}
    wanted.save_pretrained(tmp_path / "saved")
    reloaded = auto(tmp_path / "saved", **options)
    quantized = auto(folder, quantization_config=config("int8wo"), **options)
    pipe = made("flux")
    pipe.transformer = wanted
    image = picture(pipe, "flux")
    for model in (reloaded, quantized):
        pipe.transformer = model
        torch.testing.assert_close(picture(pipe, "flux"), image, rtol=0, atol=1e-5)  # on a disk weights stay float


# ---- what goes wrong


def test_patterns_and_weights_are_checked(tmp_path: Path) -> None:
    folder = saved("flux", tmp_path)
    with pytest.raises(PatternMatchesNothing):
        transformer(folder, "int8wo", exclude="no_such_layer")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.weight"][1, 2] = float("nan")
    save_file(state, file)
    with pytest.raises(NonFiniteWeight, match="proj_out"):
        transformer(folder, "int8wo")


def test_a_folder_that_lost_codes_or_its_table_is_named(tmp_path: Path) -> None:
    transformer(saved("flux", tmp_path / "float"), "int8wo").save_pretrained(tmp_path / "saved")
    file, config_file = (tmp_path / "saved" / name for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    state, told = load_file(file), json.loads(config_file.read_text())
    for key, words in (("proj_out.weight_codes", "proj_out"), ("proj_out.weight_scale", "proj_out")):
        save_file({name: tensor for name, tensor in state.items() if name != key}, file)
        with pytest.raises(StateDictMismatch, match=words):
            auto(tmp_path / "saved")
    save_file({**state, "proj_out.weight_codes": state["proj_out.weight_codes"][:-1].clone()}, file)
    with pytest.raises(StateDictMismatch, match="proj_out"):
        auto(tmp_path / "saved")
    save_file(state, file)
    told["quantization_config"]["saved"]["modules"]["no_such_layer"] = 0
    config_file.write_text(json.dumps(told))
    with pytest.raises(InvalidQuantizationMap, match="no_such_layer"):
        auto(tmp_path / "saved")
    del told["quantization_config"]["saved"]
    config_file.write_text(json.dumps(told))
    with pytest.raises(InvalidQuantizationMap, match="saved"):
        auto(tmp_path / "saved")


@pytest.mark.parametrize("first", [True, False, None])
def test_a_fresh_process_loads_it_after_one_import(first: bool | None, tmp_path: Path) -> None:
    """Before diffusers, or after it; without, diffusers refuses."""
    model = transformer(saved("flux", tmp_path / "float"), "int4wo")
    model.save_pretrained(tmp_path / "saved")
    line = "from fxquant import FxQuantConfig"
    code = FRESH.format(first=line if first else "", second=line if first is False else "")
    words = [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "state.pt")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if first is None:
        assert "Unknown quantization type, got fxquant" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found, state = torch.load(tmp_path / "state.pt"), model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_every_pipeline_is_covered() -> None:
    assert RECIPES.keys() == CALLS.keys()
