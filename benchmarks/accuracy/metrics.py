"""How near a quantized model's outputs are to the float model's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr(got: Tensor, want: Tensor) -> float:
    """Signal to quantization noise in dB over all elements, summed in float64; inf if equal, NaN if not finite."""
    exact = want.double()
    signal, noise = float(exact.square().sum()), float((got.double() - exact).square().sum())
    if not math.isfinite(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf


def agreement(got: Tensor, want: Tensor) -> float:
    """Share of rows whose largest logit is the same; [n, classes] both. A row that is not finite does not agree."""
    same = got.argmax(-1) == want.argmax(-1)
    return (same & got.isfinite().all(-1)).double().mean().item()


def psnr(got: Tensor, want: Tensor, peak: float) -> float:
    """Peak signal to noise in dB, image by image, then the mean; [n, ...] both, `peak` the width of the pixels' range.

    The mean of the images' figures, not the figure of the mean error: that one tells of the few samples that went
    another way.
    """
    errors = (got.double() - want.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(peak**2 / errors)).mean().item()
