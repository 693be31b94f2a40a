"""Models to save, and what a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import fxquant
from tests.models import Decoder

IDS = torch.arange(18).reshape(2, 9) % 128


def small(config: str = "int8dq", layers: int = 2, **fields: object) -> Decoder:
    """A quantized, frozen decoder of fixed weights."""
    torch.manual_seed(0)
    model = Decoder(layers=layers)
    fxquant.quantize(model, config, **fields)  # type: ignore[arg-type]
    fxquant.freeze(model)
    return model.eval()


def small_float() -> Decoder:
    """A float decoder of other weights."""
    torch.manual_seed(1)
    return Decoder()


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
