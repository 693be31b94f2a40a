"""compile_pipeline: whole graphs, joined projections, pictures near the float ones, models that stay what they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fxquant
from benchmarks.pipelines import LEAST_COVERAGE, LEAST_SQNR, RECIPES, measure
from fxquant.errors import InvalidOption, PatternMatchesNothing, UnknownPreset
from fxquant.nn import QModule
from tests.integrations.marks import MARKS
from tests.integrations.small_pipelines import PIPELINES, made, main_part, picture

diffusers: Any = pytest.importorskip("diffusers")
pytestmark = [*MARKS, pytest.mark.usefixtures("fresh_dynamo")]

FAST = [("pixart_sigma", "int4wo"), ("sd3", "int8dq"), ("flux", "fp8wo"), ("sd", "int8wo")]


def compiled(pipe: Any, *args: Any, **options: Any) -> Any:
    return fxquant.compile_pipeline(pipe, *args, **{"fullgraph": True, "executor": "eager", **options})


def reports(pipe: Any) -> dict[str, Any]:
    from fxquant.integrations.diffusers_compile import reports

    return reports(pipe)


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10((wanted**2).mean() / ((wanted - got) ** 2).mean()))


def quantized(name: str, preset: str) -> Any:
    """By the model door, all parts."""
    pipe = made(name)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            fxquant.quantize(part, preset)
            fxquant.freeze(part)
    return pipe


def check(name: str, preset: str, executor: str) -> None:
    found = measure(name, [preset], executor)[preset]
    assert set(found.graphs.values()) == {1}
    assert found.coverage >= LEAST_COVERAGE
    assert LEAST_SQNR[preset] < found.sqnr < 70


@pytest.mark.parametrize(("name", "preset"), FAST)
def test_a_pipeline_is_compiled_whole(name: str, preset: str) -> None:
    check(name, preset, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("preset", RECIPES)
def test_every_pipeline_in_every_recipe(name: str, preset: str) -> None:
    check(name, preset, "eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_by_inductor(name: str) -> None:
    check(name, "int8dq", "inductor")


def test_q_k_and_v_are_joined_and_keep_their_norms() -> None:
    """Where diffusers' own fusion drops the norms of q and k, and fails at a second attention."""
    pipe = compiled(made("sd3"), "int8wo", components=["transformer"])
    image = picture(pipe, "sd3")
    wanted = made("sd3")
    fxquant.quantize(wanted.transformer, "int8wo")
    fxquant.freeze(wanted.transformer)
    assert sqnr(picture(wanted, "sd3"), image) > 100  # joined apart: the same codes and scales
    assert "in 7 fused groups" in str(reports(pipe)["transformer"])


def test_what_is_quantized_keeps_its_codes_and_what_is_not_asked_for_stays_float() -> None:
    pipe = quantized("pixart_sigma", "int4wo")
    wanted = picture(pipe, "pixart_sigma")
    footprint = fxquant.memory_footprint(pipe.transformer)
    compiled(pipe, "int8wo")
    assert sqnr(wanted, picture(pipe, "pixart_sigma")) > 100
    assert fxquant.memory_footprint(pipe.transformer) == footprint
    plain = made("pixart_sigma")
    wanted = picture(plain, "pixart_sigma")
    before = {key: id(part) for key, part in plain.components.items()}
    assert compiled(plain) is plain
    assert sqnr(wanted, picture(plain, "pixart_sigma")) > 100
    assert {key: id(part) for key, part in plain.components.items()} == before
    found = reports(plain)
    assert found.keys() == {key for key, part in plain.components.items() if isinstance(part, torch.nn.Module)}
    assert {report.coverage for report in found.values()} == {0.0}


def test_components_have_their_own_recipes_and_rules() -> None:
    pipe = compiled(made("sd3"), components={"transformer": "int8dq", "text_encoder_3": "int4wo", "vae": None})
    picture(pipe, "sd3")
    found = reports(pipe)
    assert found.keys() == {"transformer", "text_encoder_3", "vae"}
    assert found["vae"].coverage == 0
    assert str(fxquant.PRESETS["int8dq"]) in {site.spec_text for site in found["transformer"].sites}
    compiled(pipe, "int8dq", components="transformer", exclude="proj_out")
    picture(pipe, "sd3")
    left = [item.name for item in reports(pipe)["transformer"].uncovered]
    assert left == ["proj_out.weight"]


def test_bad_arguments_are_named() -> None:
    pipe = made("sd")
    with pytest.raises(InvalidOption, match="unet"):
        compiled(pipe, "int8wo", components=["transformer"])
    with pytest.raises(UnknownPreset):
        compiled(pipe, "int9wo")
    with pytest.raises(PatternMatchesNothing):
        compiled(pipe, "int8wo", components=["unet"], exclude="no_such_layer")
    assert "forward" not in pipe.unet.__dict__


# ---- more than one graph


@pytest.mark.parametrize("name", ["flux", "pixart_sigma", "sd"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_new_resolution_compiles_no_more_than_the_float_model_does(name: str, dynamic: bool | None) -> None:
    counts = []
    for quantize in (False, True):
        torch._dynamo.reset()
        pipe = made(name)
        main, part = main_part(pipe)
        if quantize:
            compiled(pipe, "int8wo", components=[main], dynamic=dynamic)
        counter = CompileCounter()
        if not quantize:
            part.compile(backend=counter, fullgraph=True, dynamic=dynamic)
        for size in (32, 48, 64):
            picture(pipe, name, height=size, width=size)
        counts.append(len(reports(pipe)[main].graphs) if quantize else counter.frame_count)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("how", ["tiling", "slicing"])
def test_vae_tiling_and_slicing_stay_outside_of_the_graph(how: str) -> None:
    images = []
    for compile_it in (False, True):
        pipe = made("sd")
        getattr(pipe.vae, f"enable_{how}")()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 16, 32
        if compile_it:
            compiled(pipe, "int8wo", components=["vae"])
        images.append(picture(pipe, "sd", height=64, width=64, num_images_per_prompt=2))
        if compile_it:
            assert 1 <= len(reports(pipe)["vae"].graphs) <= 4
    assert 30 < sqnr(*images) < 70


# ---- models stay what they are


def test_a_copy_compiles_anew_and_a_saved_one_is_float(tmp_path: Path) -> None:
    pipe = compiled(made("sd"), "int8wo", components=["unet"])
    image = picture(pipe, "sd")
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    assert not any(isinstance(module, QModule) for module in pipe.unet.modules())
    pipe.unet, first = copy.deepcopy(pipe.unet), pipe.unet
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(picture(pipe, "sd"), image)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again, "sd"), picture(made("sd"), "sd"))
