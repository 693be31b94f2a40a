"""Flux and CogVideoX with a few small layers and random weights, made without a network or files."""

from __future__ import annotations

from typing import Any

import torch

WORDS = ("a", "lighthouse", "on", "cliff", "in", "the", "evening", "sun", "waves", "below", "highly", "detailed")
WIDTH = 32


def build(model: str) -> Any:
    """The small one of that kind: a name with 'cogvideox' in it makes videos, any other is a Flux."""
    torch.manual_seed(0)
    return _cogvideox() if "cogvideox" in model.lower() else _flux()


def call_of(pipe: Any) -> dict[str, Any]:
    """Arguments with which a small pipeline is called."""
    if type(pipe).__name__ == "CogVideoXPipeline":
        return {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16, "num_inference_steps": 2}
    return {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 2}


def _flux() -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    t5, t5_words = _t5()
    clip, clip_words = _clip()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=WIDTH,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    blocks: dict[str, Any] = {  # diffusers' hints allow one block only
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    vae = AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=clip,
        tokenizer=clip_words,
        text_encoder_2=t5,
        tokenizer_2=t5_words,
        transformer=transformer.eval(),
    )


def _cogvideox() -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    t5, t5_words = _t5()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH,
        in_channels=4,
        out_channels=4,
        time_embed_dim=WIDTH,
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
        tokenizer=t5_words,
        text_encoder=t5,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = sorted(set("".join(WORDS)) | {",", "\u2581"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -6.0) for letter in letters] + [(f"\u2581{word}", -3.0) for word in WORDS]
    words = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)
    config = T5Config(
        vocab_size=len(words) + 8,
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval(), words


def _clip() -> tuple[Any, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = CLIPTokenizer(vocab={name: at for at, name in enumerate(names)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=77,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
        pad_token_id=len(names) - 1,
    )
    return CLIPTextModel(config).eval(), words
