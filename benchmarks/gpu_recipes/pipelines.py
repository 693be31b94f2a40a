"""Pipelines: real ones by their id, tiny ones with random weights, and how one is called."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from tests.integrations import small_pipelines

PROMPT = "a lighthouse on a cliff in the evening sun, waves below, highly detailed"
SEED = 7


@dataclass(frozen=True)
class Setting:
    """How pipelines are loaded and called; steps None: as the pipeline has it."""

    device: str
    steps: int | None = None
    tiny: bool = False


def load(model: str, dtype: torch.dtype, setting: Setting) -> Any:
    """The pipeline in host memory, in eval mode; a tiny one if asked, in float32 on a CPU."""
    if setting.tiny:
        pipe = small_pipelines.made("cogvideox" if "cogvideox" in model.lower() else "flux")
        if setting.device != "cpu":
            pipe.to(dtype)
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe: Any) -> dict[str, torch.nn.Module]:
    """The modules of a pipeline by their names."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def quantized_parts(pipe: Any, compile_vae: bool) -> tuple[str, ...]:
    """Which parts a recipe is for: the transformer; of a video the text encoder; the VAE if it is compiled."""
    names = ["transformer"]
    if makes_videos(pipe):
        names.append("text_encoder")
    return (*names, "vae") if compile_vae else tuple(names)


def makes_videos(pipe: Any) -> bool:
    return "num_videos_per_prompt" in inspect.signature(pipe.__call__).parameters


def call(pipe: Any, batch: int, setting: Setting) -> torch.Tensor:
    """One call; the images or frames, float32 in 0 to 1."""
    arguments: dict[str, Any] = {"prompt": PROMPT}
    if setting.tiny:
        name = "cogvideox" if makes_videos(pipe) else "flux"
        arguments = {"prompt": small_pipelines.PROMPT, **small_pipelines.call_of(name)}
    arguments["num_videos_per_prompt" if makes_videos(pipe) else "num_images_per_prompt"] = batch
    if setting.steps is not None:
        arguments["num_inference_steps"] = setting.steps
    generator = torch.Generator("cpu").manual_seed(SEED)
    with torch.no_grad():
        made = pipe(generator=generator, output_type="pt", **arguments)
    return (made.frames if makes_videos(pipe) else made.images).float().cpu()
