"""Offloading, hooks and compiling in any order, on a CPU: the same pictures. The hooks are those of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from tests.integrations.marks import MARKS
from tests.integrations.small_pipelines import made, main_part, picture

diffusers: Any = pytest.importorskip("diffusers")
accelerate: Any = pytest.importorskip("accelerate")
pytestmark = [*MARKS, pytest.mark.usefixtures("fresh_dynamo")]


def quantized(name: str, preset: str, components: tuple[str, ...] = ()) -> Any:
    """These components, or all."""
    pipe = made(name)
    for key, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and (not components or key in components):
            fxquant.quantize(part, preset)
            fxquant.freeze(part)
    return pipe


def model_offload(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any, folder: Path) -> None:
    """What the pipeline's method does; given device="cpu" it asks accelerate for "cpu:0", which fails on float too."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def by_leaf(pipe: Any, folder: Path) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def by_block(pipe: Any, folder: Path) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def to_disk(pipe: Any, folder: Path) -> None:
    """The main part alone: a T5 encoder loses its table so, float or not."""
    _, part = main_part(pipe)
    part.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder))


OFFLOADS = [model_offload, sequential_offload, by_leaf, by_block, to_disk]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(("name", "preset"), [("flux", "int8dq"), ("sd", "int4wo"), ("pixart_sigma", "fp8wo")])
def test_offloading_changes_nothing(offload: Any, name: str, preset: str, tmp_path: Path) -> None:
    pipe = quantized(name, preset)
    image = picture(pipe, name)
    offload(pipe, tmp_path)
    for _ in range(2):
        assert torch.equal(picture(pipe, name), image)


def test_a_pipeline_that_is_loaded_on_a_device_map(tmp_path: Path) -> None:
    from diffusers.quantizers import PipelineQuantizationConfig

    from fxquant import FxQuantConfig  # noqa: F401

    how = PipelineQuantizationConfig(quant_backend="fxquant", quant_kwargs={"preset": "int8wo"})
    made("flux").save_pretrained(tmp_path)
    images = []
    for options in ({}, {"device_map": "cpu"}):
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, quantization_config=how, **options)
        pipe.set_progress_bar_config(disable=True)
        images.append(picture(pipe, "flux"))
    assert torch.equal(*images)


@pytest.mark.parametrize("first", ["compile", "offload"])
@pytest.mark.parametrize("quantize", [True, False])
def test_models_are_compiled_whole_inside_of_their_offloading(first: str, quantize: bool, tmp_path: Path) -> None:
    parts = ("transformer", "vae")
    pipe = quantized("pixart_sigma", "int8wo", parts)
    plain = picture(pipe, "pixart_sigma")
    pipe = quantized("pixart_sigma", "int8wo", parts) if quantize else made("pixart_sigma")
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    fxquant.compile_pipeline(pipe, "int8wo", components=parts, executor="eager", fullgraph=True)
    if first == "compile":
        pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(picture(pipe, "pixart_sigma"), plain, rtol=0, atol=1e-4)
    from fxquant.integrations.diffusers_compile import reports

    assert {len(report.graphs) for report in reports(pipe).values()} == {1}
    pipe.remove_all_hooks()
    torch.testing.assert_close(picture(pipe, "pixart_sigma"), plain, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [sequential_offload, by_block])
def test_hooks_inside_of_a_compiled_model_break_its_graph_and_change_nothing(offload: Any, tmp_path: Path) -> None:
    pipe = quantized("pixart_sigma", "int8wo")
    image = picture(pipe, "pixart_sigma")
    fxquant.compile_pipeline(pipe, components=["transformer"], executor="eager")
    offload(pipe, tmp_path)
    torch.testing.assert_close(picture(pipe, "pixart_sigma"), image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["enable_tiling", "enable_slicing"])
def test_a_quantized_vae_in_tiles_and_slices(how: str) -> None:
    images = []
    for quantize in (False, True):
        pipe = quantized("sd", "int8wo") if quantize else made("sd")
        getattr(pipe.vae, how)()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 16, 32
        images.append(picture(pipe, "sd", height=64, width=64, num_images_per_prompt=2))
    error = ((images[0] - images[1]) ** 2).mean() / (images[0] ** 2).mean()
    assert 0 < error < 1e-3
