"""Train with rounded weights: a network for digits in 2 bits, before and after quantization-aware training.

python -m examples.quantization_aware_training
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import fxquant


def data() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Images [n, 64] and classes [n], to train and to test."""
    found: Any = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return (x[train], y[train]), (x[test], y[test])


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, rate: float) -> None:
    """The same loop for float and for rounded weights: the optimizer sees ordinary float parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model(x).argmax(-1) == y).double().mean().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int2/channel/affine")
    parser.add_argument("--activations", default="int8")
    parser.add_argument("--steps", type=int, default=150)
    chosen = parser.parse_args(arguments)
    train, test = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    fit(model, *train, steps=300, rate=1e-2)
    found = {"float": accuracy(model, *test)}

    fxquant.quantize(model, weights=chosen.weights, activations=chosen.activations)
    found["rounded"] = accuracy(model, *test)
    fit(model, *train, steps=chosen.steps, rate=1e-2)
    fxquant.freeze(model)  # codes in the place of the trained weights
    found["trained with rounded weights"] = accuracy(model, *test)
    for name, share in found.items():
        print(f"{name}: {share:.1%} of {len(test[0])} digits")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # a network so small gains nothing by more, and sums keep their order
    main()
