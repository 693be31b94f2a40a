"""Small models that both fxquant and optimum-quanto quantize, by case; no import of either."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# in_features, and the group that Quanto takes for them: 64 none, 160 32, 192 96, 256 128, 320 64, 1000 none.
WIDTHS = (64, 160, 192, 256, 320, 1000)


class Case(NamedTuple):
    weights: str
    activations: str | None = None
    dtype: torch.dtype = torch.float32
    frozen: bool = True
    exclude: tuple[str, ...] = ()


CASES = {
    **{
        weights: Case(weights) for weights in ("qint8", "qint4", "qint2", "qfloat8", "qfloat8_e5m2", "qfloat8_e4m3fnuz")
    },
    "qint8 bfloat16": Case("qint8", dtype=torch.bfloat16),
    # Quanto's own kernel for bfloat16 groups of 128 refuses rows that are no multiple of 16
    "qint4 bfloat16": Case("qint4", dtype=torch.bfloat16, exclude=("linears.3", "one")),
    "qint4 float16": Case("qint4", dtype=torch.float16),
    "qfloat8 float16": Case("qfloat8", dtype=torch.float16),
    "qint8 with qint8": Case("qint8", "qint8"),
    "qint4 with qfloat8": Case("qint4", "qfloat8"),
    "qint4 not frozen": Case("qint4", frozen=False),
}


class Mixed(nn.Module):
    """Linears of all widths with odd and single rows, with and without bias, convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 7, 3)  # 288 weights a row: groups of 96
        self.plain = nn.Conv2d(3, 8, 3, bias=False)  # 27: no groups
        self.norm = nn.LayerNorm(64)
        self.linears = nn.ModuleList(nn.Linear(width, 5, bias=bool(i % 2)) for i, width in enumerate(WIDTHS))
        self.one = nn.Linear(256, 1)
        self.sixteen = nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 1000] -> [B, 5]; uses every module."""
        image = x[:, :768].reshape(-1, 3, 16, 16)
        pixels = self.plain(image).reshape(-1, 32, 7, 7)
        y = self.conv(pixels).mean((1, 2, 3))[:, None] + self.norm(x[:, :64]).sum(-1, keepdim=True) * 0.01
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            y = y + linear(x[:, : linear.in_features])
        return y + self.one(x[:, :256]) + self.sixteen(x[:, :256]).sum(-1, keepdim=True)


def build(case: Case) -> Mixed:
    """The same weights for every case, in its dtype; rows of different size and offset."""
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() > 1:
                rows = torch.linspace(0.1, 2, parameter.shape[0]).reshape(-1, *[1] * (parameter.dim() - 1))
                parameter.mul_(rows).add_(0.02 * rows)
    return model.to(case.dtype).eval()


def samples(case: Case) -> Tensor:
    """x [6, 1000] in the case's dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1000, generator=generator).to(case.dtype)
