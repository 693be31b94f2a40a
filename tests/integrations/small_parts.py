"""Small parts of diffusers pipelines, of random weights: UNet, VAE, text encoders with their tokenizers."""

from __future__ import annotations

from typing import Any

WORDS = ("a", "lighthouse", "on", "cliff", "in", "the", "evening", "sun", "waves", "below")
WIDTH = 64


def small_unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        **options,
    ).eval()


def small_vae() -> Any:
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {  # diffusers' hints allow one block only
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    ).eval()


def small_t5(width: int = WIDTH, kinds: Any = None) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = sorted(set("".join(WORDS)) | {"\u2581"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -6.0) for letter in letters] + [(f"\u2581{word}", -3.0) for word in WORDS]
    words = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)
    config, model = kinds or (T5Config, T5EncoderModel)
    encoder = model(
        config(
            vocab_size=len(words) + 8,
            d_model=width,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return words, encoder.eval()


def small_clip(*, with_projection: bool = False) -> tuple[Any, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = CLIPTokenizer(vocab={name: at for at, name in enumerate(names)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=77,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
        pad_token_id=len(names) - 1,
    )
    return words, (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()
