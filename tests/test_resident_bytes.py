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


# Each number of features and each depth; tests/numerics has every pair of them.
FEATURES, DEPTHS = (1, 8, 10, 16, 24, 40, 80, 100, 1000, 4096), (1, 3, 9, 13, 27, 64, 147, 160, 576, 1001)
LINEARS = [(n, k) for i, n in enumerate(FEATURES) for j, k in enumerate(DEPTHS) if (i + j) % 10 in (0, 3)]
CONVOLUTIONS = [  # output channels, input channels, size of the kernel
    (1, 3, 1),
    (8, 1, 3),
    (8, 3, 3),
    (16, 13, 1),
    (24, 64, 1),
    (40, 160, 1),
    (64, 3, 7),
    (80, 64, 3),
    (100, 3, 3),
    (1000, 1, 3),
]


class Narrow(nn.Module):
    """Layers of all these sizes, each with an input of its own: what reads one value is joined into one product."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False) for n, k in LINEARS)
        self.convs = nn.ModuleList(nn.Conv2d(c, n, size, bias=False) for n, c, size in CONVOLUTIONS)

    def inputs(self) -> list[Tensor]:
        images = [torch.randn(1, c, size, size) for _, c, size in CONVOLUTIONS]
        return [*(torch.randn(2, k) for _, k in LINEARS), *images]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip([*self.linears, *self.convs], inputs, strict=True)]


@pytest.mark.parametrize("preset", PRESETS)
def test_each_narrow_layer_takes_what_its_format_promises(preset: str) -> None:
    spec = PRESETS[preset].weights
    assert spec is not None
    torch.manual_seed(0)
    model = Narrow().eval()
    sizes = {f"linears.{i}": shape for i, shape in enumerate(LINEARS)}
    sizes |= {f"convs.{i}": (n, c * size * size) for i, (n, c, size) in enumerate(CONVOLUTIONS)}
    before = process_store().resident_bytes
    compiled = fxquant.compile(model, preset=preset, executor="eager")
    with torch.no_grad():
        compiled(*model.inputs())
    held = {path: site.bytes_after for site in compiled.report().sites for path in site.paths}
    assert held.keys() == sizes.keys()
    for path, shape in sizes.items():
        promised = spec.nbytes(shape)
        assert abs(held[path] - promised) <= max(16, 0.02 * promised), (path, shape)
    assert sum(held.values()) == process_store().resident_bytes - before
