"""The models that every tool gets: float32, in eval mode, a function of tensors to one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.peers import smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = tuple[Tensor, ...]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Subject:
    """A model, the inputs that are timed, and others of the same shape to calibrate on.

    rewind   puts the model's state back to what it was before a call; called before each one.
    step     one token is decoded: a model that is called again and again.
    tokens   the ids behind it, if it is SmolLM2: prefix and the part that is timed, for tools that load it themselves.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    calibration: Sequence[Inputs]
    rewind: Callable[[], None] = _nothing
    tokens: tuple[Sequence[int], Sequence[int]] | None = None
    exportable: bool = True
    step: bool = False


class Logits(nn.Module):
    """A transformers language model without a cache as a function of ids; `keep` last positions, 0 for all."""

    def __init__(self, lm: nn.Module, keep: int = 0) -> None:
        super().__init__()
        self.lm, self.keep = lm, keep

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [batch, tokens] -> float32 [batch, kept, vocabulary]."""
        return self.lm(input_ids=ids, use_cache=False, logits_to_keep=self.keep).logits


class DecodeStep(nn.Module):
    """One token behind a prefix that lies in a static cache of `length` tokens."""

    def __init__(self, lm: PreTrainedModel, prefix: Tensor, length: int) -> None:
        super().__init__()
        from transformers import StaticCache

        self.lm, self.position = lm, prefix.shape[1]
        self.cache = StaticCache(config=lm.config, max_cache_len=length)
        with torch.no_grad():
            lm(input_ids=prefix, past_key_values=self.cache)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.position)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [1, 1] -> float32 [1, 1, vocabulary]."""
        return self.lm(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits


def decoder(batch: int, tokens: int) -> Subject:
    """The Llama-like decoder: width 1024, 4 layers, 16 heads on 4, MLP 2816, vocabulary 8192, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = Logits(LlamaForCausalLM(config)).eval().requires_grad_(False)
    inputs, *rest = [(torch.randint(0, 8192, (batch, tokens)),) for _ in range(5)]
    return Subject(f"decoder, {batch} x {tokens} tokens", model, inputs, rest, step=batch * tokens == 1)


def encoder() -> Subject:
    """MiniLM, 32 sentences of 64 tokens."""
    from benchmarks.models import encoder as minilm

    model, (ids, mask) = minilm(32)
    rest = [(ids.roll(shift, 0), mask.roll(shift, 0)) for shift in (7, 16)]
    return Subject("MiniLM, 32 x 64 tokens", model.requires_grad_(False), (ids, mask), rest)


def vision() -> Subject:
    """A ViT of ViT-S's width: 6 blocks, 196 patches of 16 x 16 and the class token, random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = ViTForImageClassification(config)

        def forward(self, images: Tensor) -> Tensor:
            return self.vit(images).logits

    model = Classes().eval().requires_grad_(False)
    inputs, *rest = [(torch.randn(4, 3, 224, 224),) for _ in range(3)]
    return Subject("ViT 384 x 6, 4 images of 224", model, inputs, rest)


def diffusion() -> Subject:
    """A DiT block stack: width 384, 6 blocks, 256 latent patches, random weights."""
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from diffusers import DiTTransformer2DModel

    from benchmarks.accuracy.dit import Velocity

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=6, sample_size=32
    )
    for parameter in transformer.parameters():  # a fresh DiT's gates are zero: nothing would pass its blocks
        if not parameter.count_nonzero():
            nn.init.normal_(parameter, std=0.02)
    model = Velocity(transformer).eval().requires_grad_(False)
    inputs, *rest = [(torch.randn(2, 4, 32, 32), torch.tensor([t, t]), torch.tensor([1, 2])) for t in (500, 100, 900)]
    return Subject("DiT 384 x 6, 2 x 256 patches", model, inputs, rest)


PREFIX, PREFILL, CACHE = 64, 512, 128


def smollm2_step() -> Subject:
    """SmolLM2-135M: one token behind 64, in a static cache of 128."""
    lm, ids = smollm2.load(), smollm2.text_ids(PREFIX + 1)
    prefix, step = torch.tensor([ids[:PREFIX]]), torch.tensor([ids[PREFIX:]])
    model = DecodeStep(lm, prefix, CACHE).eval().requires_grad_(False)
    tokens = (ids[:PREFIX], ids[PREFIX:])
    name = "SmolLM2-135M, one decode step"
    return Subject(name, model, (step,), [(step,)], model.rewind, tokens, exportable=False, step=True)


def smollm2_prefill() -> Subject:
    """SmolLM2-135M: 512 tokens, the logits of the last one."""
    ids = smollm2.text_ids(5 * PREFILL)
    model = Logits(smollm2.load(), keep=1).eval().requires_grad_(False)
    parts = [(torch.tensor([ids[i : i + PREFILL]]),) for i in range(0, len(ids) - PREFILL + 1, PREFILL)]
    return Subject("SmolLM2-135M, prefill of 512", model, parts[0], parts[1:], tokens=((), ids[:PREFILL]))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "decoder-1": lambda: decoder(1, 1),
    "decoder-128": lambda: decoder(1, 128),
    "decoder-1024": lambda: decoder(4, 256),
    "minilm": encoder,
    "vit": vision,
    "dit": diffusion,
    "smollm2-step": smollm2_step,
    "smollm2-prefill": smollm2_prefill,
}
