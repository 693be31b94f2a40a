"""Small transformers models of random weights, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = 256
TOKENS = torch.arange(14).reshape(2, 7) * 37 % WORDS
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
_IMAGES: dict[str, Any] = {k: v for k, v in _SIZES.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
_WHISPER: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# By name: the class of the model, that of its config, and the config's fields.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "tied": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": WORDS}),
    "bert": ("BertModel", "BertConfig", _SIZES),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _GROUPED | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _GROUPED | _EXPERTS),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": WORDS,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 32,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED | {"head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED | {"pad_token_id": 0}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", _SIZES | {"pad_token_id": 0}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGES),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _SIZES, "vision_config": _IMAGES, "projection_dim": 64},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": WORDS},
    ),
}


def model_class(name: str) -> Any:
    """The class of the model of that name."""
    import transformers

    return getattr(transformers, MODELS[name][0])


def made(name: str, **fields: Any) -> Any:
    """A float model, the same at each call."""
    import transformers

    _, config, own = MODELS[name]
    torch.manual_seed(0)
    return model_class(name)(getattr(transformers, config)(**own, **fields)).eval()


def saved(name: str, folder: Path, **fields: Any) -> Path:
    """The folder of a float model."""
    made(name, **fields).save_pretrained(folder)
    return folder


def inputs(model: Any) -> dict[str, Tensor]:
    """What the model is called with: ids, images, sound, or two of them."""
    torch.manual_seed(1)
    given: dict[str, Tensor] = {}
    config, kind = model.config, type(model).__name__
    if kind.startswith("Whisper"):
        given["input_features"] = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    elif model.main_input_name == "input_ids":
        given["input_ids"] = TOKENS
    if kind.startswith(("ViT", "CLIP")):
        given["pixel_values"] = torch.randn(2, 3, 32, 32)
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = TOKENS
    return given


def answer(model: Any, call: Any = None) -> Tensor:
    """The first output for `inputs`: logits, or hidden states. call: what is called in the model's place."""
    with torch.no_grad():
        return (model if call is None else call)(**inputs(model))[0]
