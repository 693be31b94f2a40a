"""What a preset keeps in memory after the first call is what its format promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.spec import PRESETS
from fxquant.weights import process_store


class Layers(nn.Module):
    """A table, a linear, a convolution (K = 576) and a depthwise one (K = 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 640)
        self.linear = nn.Linear(640, 512, bias=False)
        self.conv = nn.Conv2d(64, 128, 3, bias=False)
        self.depthwise = nn.Conv2d(128, 128, 3, groups=128, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.linear(self.table(ids))
        return self.depthwise(self.conv(rows.view(1, 64, 8, 8)))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_store_holds_what_the_format_promises(preset: str) -> None:
    spec = PRESETS[preset].weights
    assert spec is not None
    torch.manual_seed(0)
    model = Layers().eval()
    shapes = [(300, 640), (512, 640), (128, 576), (128, 9)]
    promised = sum(spec.nbytes(shape) for shape in shapes)
    before = process_store().resident_bytes
    compiled = fxquant.compile(model, preset=preset, embeddings=str(spec), executor="eager")
    with torch.no_grad():
        compiled(torch.arange(8) * 37)
    resident = process_store().resident_bytes - before
    assert resident == pytest.approx(promised, rel=0.02)
    assert sum(site.bytes_after for site in compiled.report().sites) == resident
