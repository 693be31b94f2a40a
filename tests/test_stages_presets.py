"""Every preset on the kinds of model there are: each stage runs and agrees with the one before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxquant.spec import PRESETS, QuantConfig
from tests.models import AttentionBlock, GatedMlp
from tests.site_bounds import assert_site_within_bound
from tests.test_stages_agree import captured_calls, distance, noise, rows, run_stages, same_bits


class ConvNet(nn.Module):
    """Strided, grouped and pointwise convolutions, then a linear. K is 27, 54, 9, 12: no multiple of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.pointwise = nn.Conv2d(12, 70, 1)
        self.head = nn.Linear(70, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.depthwise(self.grouped(x)))
        return self.head(torch.relu(self.pointwise(x)).mean((2, 3)))


class Volumes(nn.Module):
    """A 1-D convolution with dilation and a 3-D one, on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(6, 9, 3, dilation=2, padding="same")
        self.solid = nn.Conv3d(1, 5, (2, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        return self.solid(y.view(y.shape[0], 1, 3, 3, -1)).flatten(1)


class Tagger(nn.Module):
    """An embedding table, looked up and summed with another, and a linear of width 33."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 33), nn.Embedding(16, 33)
        self.out = nn.Linear(33, 7)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.out(torch.tanh(self.words(ids) + self.places(places)))


def token_ids(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (batch, 6), generator=torch.Generator().manual_seed(5)),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "attention": (lambda: AttentionBlock(36, 4, 2, bias=True), lambda batch: (rows(batch, 6, 36),)),
    "mlp": (lambda: GatedMlp(33, 47), lambda batch: (rows(batch, 3, 33),)),
    "conv net": (ConvNet, lambda batch: (rows(batch, 3, 9, 11),)),
    "volumes": (Volumes, lambda batch: (rows(batch, 6, 8),)),
    "embedding": (Tagger, token_ids),
}
WEIGHTS = {name: str(spec.weights) for name, spec in PRESETS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_preset(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, dynamic=False)


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_with_dynamic_shapes(name: str) -> None:
    check(name, torch.float32, dynamic=True)


def check(name: str, dtype: torch.dtype, *, dynamic: bool) -> None:
    make, inputs_for = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().to(dtype)
    sizes = (2, 3) if dynamic else (2,)
    batches = [[x.to(dtype) if x.is_floating_point() else x for x in inputs_for(size)] for size in sizes]
    captured, calls = captured_calls(model, batches, dynamic)
    for preset in PRESETS:
        config = QuantConfig(preset, embeddings=WEIGHTS[preset])
        for args in calls:
            stages = run_stages(captured, config, args)
            out = stages.outputs
            same_bits(stages, "capture", "annotate")
            # Joined products are summed in another order: measured at most 1.9 eps.
            assert distance(out["fuse-siblings"], out["annotate"]) <= 8 * torch.finfo(dtype).eps
            same_bits(stages, "insert-qdq", "share-quantize")
            same_bits(stages, "share-quantize", "fold-weights")
            report = stages.lowered.report
            assert {site.status for site in report.sites if site.is_quantized} == {"lowered"}, preset
            assert stages.sites
            for node, call, got in stages.sites:
                assert_site_within_bound(node, call, got)
            if dtype is torch.float32:
                assert noise(out["lower"], out["fold-weights"]) >= 100, preset
