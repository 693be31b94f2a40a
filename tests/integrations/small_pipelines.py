"""Small diffusers pipelines with random weights, made without a network or files; the same in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integrations.small_parts import WIDTH, small_clip, small_t5, small_unet, small_vae

PROMPT = "a lighthouse on a cliff in the evening sun"
CALLS: dict[str, dict[str, Any]] = {
    "pixart_sigma": {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    "sd3": {"max_sequence_length": 16},
    "auraflow": {"max_sequence_length": 16},
    "flux": {"max_sequence_length": 16},
    "cogvideox": {"max_sequence_length": 16, "num_frames": 9, "height": 64, "width": 64},
    "sd": {},
    "sdxl": {},
}
PIPELINES = tuple(CALLS)


def made(name: str) -> Any:
    """The pipeline of that name in float32."""
    torch.manual_seed(0)
    pipe = globals()[f"_{name}"]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(name: str, folder: Path) -> Path:
    """Where that pipeline was saved."""
    made(name).save_pretrained(folder)
    return folder


def call_of(name: str) -> dict[str, Any]:
    """Arguments with which that pipeline is called: a small picture, or a short video, in two steps."""
    return {"height": 32, "width": 32, "num_inference_steps": 2, **CALLS[name]}


def picture(pipe: Any, name: str, **options: Any) -> torch.Tensor:
    """Two steps at a fixed seed; images or frames, 0 to 1."""
    call = call_of(name) | options
    with torch.no_grad():
        out = pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **call)
    return out.frames if name == "cogvideox" else out.images


def main_part(pipe: Any) -> tuple[str, Any]:
    """The transformer or the UNet, and its name."""
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    return name, getattr(pipe, name)


# ---- transformers


def _pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    words, encoder = small_t5()
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    scheduler: Any = DPMSolverMultistepScheduler()  # diffusers' hints: one of an Enum
    return PixArtSigmaPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=small_vae(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    words, t5 = small_t5(2 * WIDTH)  # as wide as both poolings together
    clip_words, clip = small_clip(with_projection=True)
    other_words, other = small_clip(with_projection=True)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",  # what diffusers' own fusion of q, k and v forgets
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=small_vae(),
        text_encoder=clip,
        tokenizer=clip_words,
        text_encoder_2=other,
        tokenizer_2=other_words,
        text_encoder_3=t5,
        tokenizer_3=words,
    )


def _auraflow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    words, encoder = small_t5(kinds=(UMT5Config, UMT5EncoderModel))
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=small_vae(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    words, t5 = small_t5()
    clip_words, clip = small_clip()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=small_vae(),
        text_encoder=clip,
        tokenizer=clip_words,
        text_encoder_2=t5,
        tokenizer_2=words,
        transformer=transformer.eval(),
    )


def _cogvideox() -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    words, encoder = small_t5()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    blocks: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8)}
    vae = AutoencoderKLCogVideoX(
        **blocks,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=64,
        sample_width=64,
    )
    return CogVideoXPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )


# ---- UNets


def _sd() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    words, clip = small_clip()
    checker: Any = None
    scheduler: Any = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=clip,
        tokenizer=words,
        unet=small_unet(cross_attention_dim=WIDTH),
        scheduler=scheduler,
        safety_checker=checker,
        feature_extractor=checker,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    words, clip = small_clip()
    other_words, other = small_clip(with_projection=True)
    unet = small_unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    scheduler: Any = EulerDiscreteScheduler()
    return StableDiffusionXLPipeline(
        vae=small_vae(),
        text_encoder=clip,
        text_encoder_2=other,
        tokenizer=words,
        tokenizer_2=other_words,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
