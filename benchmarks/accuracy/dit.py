"""dit-digits, a small diffusion transformer: are the samples those of the float model, from the same noise?"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.accuracy.metrics import psnr, sqnr
from benchmarks.accuracy.subject import SQNR, Forward, Metric, Outputs, Subject

FOLDER = Path(__file__).parent / "assets" / "dit-digits"
STEPS = 20
GUIDANCE = 1.5
NO_CLASS = 10
PIXEL_RANGE = 2.0  # from -1 to 1
SAMPLES = 500


class Velocity(nn.Module):
    """The transformer as a function of tensors."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """[n, 1, 8, 8], int64 [n], int64 [n] -> [n, 1, 8, 8]."""
        return self.transformer(x, timestep=timestep, class_labels=label, return_dict=False)[0]


def load_model() -> Velocity:
    """The trained transformer of the assets, in eval mode, its parameters frozen."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from diffusers import DiTTransformer2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    transformer = DiTTransformer2DModel.from_pretrained(FOLDER, low_cpu_mem_usage=False)
    return Velocity(transformer).eval().requires_grad_(False)


def start(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise [count, 1, 8, 8] and the classes 0 to 9 in turn."""
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise, torch.arange(count) % 10


@torch.no_grad()
def trajectory(model: Forward, x: Tensor, label: Tensor, steps: int = STEPS) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """The samples that Euler's method reaches from noise `x`, and the inputs of every call of the model.

    Guided: each call computes all samples with their class and without one, in one batch of twice the count.
    """
    labels = torch.cat([label, torch.full_like(label, NO_CLASS)])
    times = [1 - step / steps for step in range(steps + 1)]
    calls = []
    for now, then in pairwise(times):
        inputs = (torch.cat([x, x]), torch.full_like(labels, int(999 * now)), labels)
        calls.append(inputs)
        with_class, without = model(*inputs).chunk(2)
        x = x + (then - now) * (without + GUIDANCE * (with_class - without))
    return x, calls


def spread(calls: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One batch of a call's size with rows of all calls, each class at every step."""
    rows = torch.arange(calls[0][0].shape[0])
    # Classes go round in tens: one step further with each ten, so that no class meets only some of the steps.
    picked = (rows + rows // 10) % len(calls)
    return tuple(torch.stack(parts)[picked, rows] for parts in zip(*calls, strict=True))


def score(got: Outputs, want: Outputs) -> dict[str, float]:
    return {
        "psnr": psnr(got["samples"], want["samples"], PIXEL_RANGE),
        "sqnr": sqnr(got["velocity"], want["velocity"]),
    }


def subject(quick: bool = False) -> Subject:
    """The transformer and 500 samples (`quick`: 20)."""
    model = load_model()
    noise, label = start(20 if quick else SAMPLES)
    probe = spread(trajectory(model, noise, label)[1])

    @torch.no_grad()
    def run(model: Forward) -> Outputs:
        return {"samples": trajectory(model, noise, label)[0], "velocity": model(*probe)}

    return Subject(
        name="dit",
        title="dit-digits (diffusion transformer)",
        source=f"dit-digits; {len(noise)} samples, {STEPS} Euler steps, guidance {GUIDANCE}, same noise as float; "
        "the SQNR is of the velocities at the float model's own points",
        timed_as=f"one step of {len(noise)} samples ({2 * len(noise)} rows of 16 tokens)",
        metrics=(Metric("psnr", "PSNR to float samples dB", 1), SQNR),
        model=model,
        run=run,
        score=score,
        timed=probe,
    )
