"""The linears of models that people quantize: sizes, and how many rows they get. For `fxquant tune --shapes`.

python -m benchmarks.shapes --json FILE [--preset NAME ...] [--dtype NAME]

Sizes come from the models' configurations on the Hugging Face hub, rows from their pipelines' defaults in diffusers:

Flux.1-dev    `black-forest-labs/FLUX.1-dev`, transformer/config.json: 19 double and 38 single blocks, 24 heads of 128,
              joint_attention_dim 4096, pooled_projection_dim 768, in_channels 64. 1024 x 1024 pixels are 64 x 64
              patches of 2 x 2 latents: 4096 tokens; max_sequence_length 512 of text.
SD3-medium    `stabilityai/stable-diffusion-3-medium-diffusers`: 24 blocks, 24 heads of 64, joint_attention_dim 4096,
              pooled_projection_dim 2048, patch_size 2. 4096 tokens; text 77 of CLIP and 256 of T5.
PixArt-Sigma  `PixArt-alpha/PixArt-Sigma-XL-2-1024-MS`: 28 blocks, 16 heads of 72, caption_channels 4096, patch_size 2.
              4096 tokens; 300 of text.
AuraFlow      `fal/AuraFlow-v0.3`: 4 double and 32 single blocks, 12 heads of 256, joint_attention_dim 2048; in_channels
              4; feed-forward of 2/3 of 4 x 3072, to a multiple of 256. 4096 tokens; 256 of text behind 8 registers.
CogVideoX-5b  `THUDM/CogVideoX-5b`: 42 blocks, 48 heads of 64, text_embed_dim 4096, time_embed_dim 512, patch_size 2.
              49 frames of 480 x 720 are 13 x 30 x 45 patches: 17550 tokens; 226 of text.
Llama-3-8B    `meta-llama/Meta-Llama-3-8B`, config.json: hidden 4096, intermediate 14336, 32 heads of 128 on 8,
              vocabulary 128256. Prefill of 2048 tokens, decode of 1.

Linears that read one value are one linear, as the pass `fuse-siblings` joins them. A batch is what the model sees: with
classifier-free guidance two of it make a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxquant import PRESETS
from fxquant.target import Problem

BATCHES = (1, 4)
PROMPT = 2048


@dataclass(frozen=True)
class Linear:
    """A linear [n, k] of a model, and the rows that it gets: `tokens` a sample.

    phase  'denoise', 'modulation' (one row a sample), 'prefill' or 'decode'.
    """

    model: str
    name: str
    n: int
    k: int
    tokens: int
    phase: str = "denoise"

    def rows(self, batch: int) -> int:
        return self.tokens * batch


def _double_stream(model: str, width: int, image: int, text: int, mlp: int) -> Iterator[Linear]:
    """Linears of a block in which image and text have weights of their own."""
    for side, tokens in (("image", image), ("text", text)):
        yield Linear(model, f"double.{side}.qkv", 3 * width, width, tokens)
        yield Linear(model, f"double.{side}.out", width, width, tokens)
        yield Linear(model, f"double.{side}.ff.up", mlp, width, tokens)
        yield Linear(model, f"double.{side}.ff.down", width, mlp, tokens)
    yield Linear(model, "double.modulation", 6 * width, width, 1, "modulation")


def _flux() -> Iterator[Linear]:
    model, width, image, text = "Flux.1-dev", 3072, 4096, 512
    yield from _double_stream(model, width, image, text, 4 * width)
    yield Linear(model, "single.qkv+mlp", 3 * width + 4 * width, width, image + text)
    yield Linear(model, "single.out", width, 5 * width, image + text)
    yield Linear(model, "single.modulation", 3 * width, width, 1, "modulation")
    yield Linear(model, "context_embedder", width, 4096, text)
    yield Linear(model, "time_embed", width, width, 1, "modulation")
    yield Linear(model, "pooled_embed", width, 768, 1, "modulation")
    yield Linear(model, "norm_out", 2 * width, width, 1, "modulation")
    yield Linear(model, "proj_out", 64, width, image)


def _sd3() -> Iterator[Linear]:
    model, width, image, text = "SD3-medium", 1536, 4096, 77 + 256
    yield from _double_stream(model, width, image, text, 4 * width)
    yield Linear(model, "context_embedder", width, 4096, text)
    yield Linear(model, "pooled_embed", width, 2048, 1, "modulation")
    yield Linear(model, "norm_out", 2 * width, width, 1, "modulation")
    yield Linear(model, "proj_out", 64, width, image)


def _pixart() -> Iterator[Linear]:
    model, width, image, text = "PixArt-Sigma", 1152, 4096, 300
    yield Linear(model, "self.qkv", 3 * width, width, image)
    yield Linear(model, "self.out", width, width, image)
    yield Linear(model, "cross.q", width, width, image)
    yield Linear(model, "cross.kv", 2 * width, width, text)
    yield Linear(model, "ff.up", 4 * width, width, image)
    yield Linear(model, "ff.down", width, 4 * width, image)
    yield Linear(model, "modulation", 6 * width, width, 1, "modulation")
    yield Linear(model, "caption_projection", width, 4096, text)
    yield Linear(model, "proj_out", 32, width, image)


def _aura() -> Iterator[Linear]:
    model, width, image, text, mlp = "AuraFlow", 3072, 4096, 256 + 8, 8192
    for side, tokens in (("double.image", image), ("double.text", text), ("single", image + text)):
        yield Linear(model, f"{side}.qkv", 3 * width, width, tokens)
        yield Linear(model, f"{side}.out", width, width, tokens)
        yield Linear(model, f"{side}.ff.gate+up", 2 * mlp, width, tokens)
        yield Linear(model, f"{side}.ff.down", width, mlp, tokens)
    yield Linear(model, "modulation", 6 * width, width, 1, "modulation")
    yield Linear(model, "context_embedder", width, 2048, text)
    yield Linear(model, "proj_out", 16, width, image)


def _cog() -> Iterator[Linear]:
    model, width, both = "CogVideoX-5b", 3072, 13 * 30 * 45 + 226
    yield Linear(model, "qkv", 3 * width, width, both)
    yield Linear(model, "out", width, width, both)
    yield Linear(model, "ff.up", 4 * width, width, both)
    yield Linear(model, "ff.down", width, 4 * width, both)
    yield Linear(model, "modulation", 6 * width, 512, 1, "modulation")
    yield Linear(model, "text_proj", width, 4096, 226)
    yield Linear(model, "proj_out", 64, width, 13 * 30 * 45)


def _llama() -> Iterator[Linear]:
    sizes = (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate+up", 28672, 4096), ("down", 4096, 14336))
    for phase, tokens in (("decode", 1), ("prefill", PROMPT)):
        for name, n, k in sizes:
            yield Linear("Llama-3-8B", f"{phase}.{name}", n, k, tokens, phase)
    yield Linear("Llama-3-8B", "lm_head", 128256, 4096, 1, "decode")


LINEARS: tuple[Linear, ...] = tuple(
    linear for model in (_flux, _sd3, _pixart, _aura, _cog, _llama) for linear in model()
)


def problems_of(presets: Sequence[str], dtype: str = "bfloat16") -> list[Problem]:
    """Each linear at each of its numbers of rows, in each preset's formats; equal ones once."""
    found: dict[Problem, None] = {}
    for preset in presets:
        spec = PRESETS[preset]
        weights, activations = str(spec.weights), str(spec.activations or "")
        for linear in LINEARS:
            for batch in BATCHES:
                problem = Problem("linear", linear.rows(batch), linear.n, linear.k, weights, activations, dtype)
                found[problem] = None
    return list(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=["int8dq"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    chosen = parser.parse_args(arguments)
    problems = problems_of(chosen.preset, chosen.dtype)
    chosen.json.write_text(json.dumps([problem.to_json() for problem in problems], indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(problems)} problems in {chosen.json}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
