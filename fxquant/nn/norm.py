"""Norms whose output is rounded. Their weights, one number a feature, stay float and can be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.errors import IncompleteModuleKind
from fxquant.nn.base import QModule
from fxquant.nn.registry import register_module
from fxquant.nn.warn import warn_uncalibrated
from fxquant.spec import LinearSpec

_FXQUANT = torch.ops.fxquant


class _Norm(QModule):
    """``quantization`` has activations only, and they are the output: rounded by its own range, or, after a
    `Calibration`, by ``output_scale``. The gradient goes straight through the rounding."""

    weight_names = ()
    kind = "norm"

    @classmethod
    def unfit(cls, module: nn.Module, spec: LinearSpec) -> str:
        return ""

    def normalized(self, x: Tensor) -> Tensor:
        """What torch's module computes."""
        raise IncompleteModuleKind(type(self).__name__, "normalized", "computes the layer")

    def extra_repr(self) -> str:
        static = ", static" if self.output_scale is not None else ""
        return f"{super(QModule, self).extra_repr()}, y={self._activation_spec}{static}"

    def _computed(self, x: Tensor, activations: str) -> Tensor:
        if self._uncalibrated:
            warn_uncalibrated(self._uncalibrated)
        y = self.normalized(x)
        if not activations:
            return y
        if self.output_scale is not None:
            return _FXQUANT.fake_quantize_static(y, self.output_scale, self._static_spec)
        return _FXQUANT.fake_quantize(y, activations)


@register_module(nn.LayerNorm)
class QLayerNorm(_Norm, nn.LayerNorm):
    """nn.LayerNorm with a rounded output, a float tensor."""

    def normalized(self, x: Tensor) -> Tensor:
        return nn.LayerNorm.forward(self, x)


@register_module(nn.RMSNorm)
class QRMSNorm(_Norm, nn.RMSNorm):
    """nn.RMSNorm with a rounded output, a float tensor."""

    def forward(self, x: Tensor) -> Tensor:  # as callers name it
        return super().forward(x)

    def normalized(self, x: Tensor) -> Tensor:
        return nn.RMSNorm.forward(self, x)
