"""Text to images by a diffusion transformer, float beside int8 and int4, from the same noise; a PNG with a row of each.

python -m examples.text_to_image "four two seven" --out digits.png
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

import fxquant

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NO_CLASS = 10


@torch.no_grad()
def sample(model, labels: torch.Tensor, seed: int = 0, steps: int = 20, guidance: float = 1.5) -> torch.Tensor:
    """Images [n, 1, 8, 8] of -1 to 1 for classes [n]: Euler's method along the flow, guided by the class."""
    x = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    for step in range(steps):
        time = torch.full_like(both, int(999 * (1 - step / steps)))
        velocity = model(torch.cat([x, x]), timestep=time, class_labels=both, return_dict=False)[0]
        with_class, without = velocity.chunk(2)
        x = x - (without + guidance * (with_class - without)) / steps
    return x


def grid(rows: list[torch.Tensor], zoom: int = 12) -> Image.Image:
    """Rows of images, one below the other."""
    joined = torch.cat([row.squeeze(1).permute(1, 0, 2).flatten(1) for row in rows])
    pixels = ((joined.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def psnr(image: torch.Tensor, exact: torch.Tensor) -> float:
    return (10 * torch.log10(4 / (image - exact).square().flatten(1).mean(1))).mean().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=" ".join(WORDS), help="digits in words")
    parser.add_argument("--out", type=Path, default=Path("digits.png"))
    parser.add_argument("--presets", nargs="+", default=["int8dq", "int4wo"])
    chosen = parser.parse_args(arguments)
    if unknown := [word for word in chosen.prompt.split() if word not in WORDS]:
        parser.error(f"this model draws {', '.join(WORDS)}; not {', '.join(unknown)}")
    from examples.weights import image_generator

    model = DiTTransformer2DModel.from_pretrained(image_generator(), low_cpu_mem_usage=False).eval()
    labels = torch.tensor([WORDS.index(word) for word in chosen.prompt.split()])
    exact = sample(model, labels)
    rows, found = [exact], {}
    for preset in chosen.presets:
        quantized = copy.deepcopy(model)
        fxquant.quantize(quantized, preset)
        fxquant.freeze(quantized)
        rows.append(sample(quantized, labels))
        found[preset] = psnr(rows[-1], exact)
        size, before = fxquant.memory_footprint(quantized), fxquant.memory_footprint(model)
        print(f"{preset}: {found[preset]:.1f} dB to the float images, {size / 1e6:.1f} MB of {before / 1e6:.1f}")
    grid(rows).save(chosen.out)
    print(f"{chosen.out}: float, {', '.join(chosen.presets)}, from above")
    return found


if __name__ == "__main__":
    main()
