"""LoRA in a pipeline with quantized models: diffusers makes the config of peft, so layers learn to merge later."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxquant.model.lora import let_merge


def let_lora_merge(pipe: Any) -> int:
    """Let `fuse_lora` merge adapters into codes. To be called after `load_lora_weights`, `add_adapter` and the like.

    pipe: a pipeline, or a model. Adapters are loaded, trained and swapped without it; a merge then raises
    `FrozenWeight`. What merging rounds, and what it refuses: see `fxquant.peft_config`. `unfuse_lora` puts the codes
    back that were there before, bit for bit.

    Returns how many layers were changed.
    """
    parts = [pipe] if isinstance(pipe, nn.Module) else pipe.components.values()
    return sum(let_merge(part) for part in parts if isinstance(part, nn.Module))
