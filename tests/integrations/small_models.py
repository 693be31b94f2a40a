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
        },
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


def answer(model: Any) -> Tensor:
    """The first output for `TOKENS`: logits, or hidden states."""
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    with torch.no_grad():
        return model(**inputs)[0]
