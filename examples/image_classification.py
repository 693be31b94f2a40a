"""Classify images by a quantized EfficientNet-Lite0, compiled, beside float: scikit-learn's two photos, or your files.

python -m examples.image_classification [photo.jpg ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy
import torch
from PIL import Image

import fxquant
from benchmarks.accuracy.efficientnet import load_model

SIDE = 224


def prepared(image: Image.Image) -> torch.Tensor:
    """The middle of an image as the network wants it, [3, 224, 224]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.convert("RGB").crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    return (torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() - 127) / 128


def photos(files: list[Path]) -> dict[str, Image.Image]:
    """The files' images; without files, two photos that scikit-learn carries."""
    if files:
        return {file.name: Image.open(file) for file in files}
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    names = [Path(name).name for name in found.filenames]
    return {name: Image.fromarray(pixels) for name, pixels in zip(names, found.images, strict=True)}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, tuple[int, int]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--preset", default="int8dq")
    parser.add_argument("--executor", default="inductor", choices=("inductor", "eager"))
    chosen = parser.parse_args(arguments)
    images = photos(chosen.files)
    batch = torch.stack([prepared(image) for image in images.values()])

    model = load_model()
    quantized = fxquant.compile(model, chosen.preset, executor=chosen.executor, fullgraph=True)
    exact, found = model(batch).softmax(-1), quantized(batch).softmax(-1)

    classes = {}
    for name, one, other in zip(images, exact, found, strict=True):
        classes[name] = int(one.argmax()), int(other.argmax())
        best = ", ".join(f"{index} ({other[index]:.0%})" for index in other.topk(3).indices.tolist())
        print(f"{name}: ImageNet classes {best}; float says {classes[name][0]} ({one.max():.0%})")
    return classes


if __name__ == "__main__":
    main()
