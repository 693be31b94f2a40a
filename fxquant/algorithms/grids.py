"""The values that the codes of a granule stand for: what a search compares ranges by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.algorithms.ranges import Range, scales_of
from fxquant.spec import NumberFormat, TensorSpec


@dataclass(frozen=True)
class Grid:
    """The values of all codes of some granules: steps * scale [+ shift]. All tensors float32, [..., g, 1].

    scale   the size of a step, with the tensor scale.
    factor  what x is multiplied by to count it in steps.
    offset  zero point (affine) or shift; None if symmetric.
    """

    spec: TensorSpec
    scale: Tensor
    factor: Tensor
    offset: Tensor | None

    def of(self, granules: slice) -> Grid:
        """The grids of some of the granules."""
        offset = None if self.offset is None else self.offset[..., granules, :]
        return Grid(self.spec, self.scale[..., granules, :], self.factor[..., granules, :], offset)

    def each(self) -> list[Grid]:
        """The grids [g, 1] of candidates that were made together, [candidates, g, 1]."""
        offsets = [None] * len(self.scale) if self.offset is None else self.offset.unbind()
        fields = zip(self.scale.unbind(), self.factor.unbind(), offsets, strict=True)
        return [Grid(self.spec, *each) for each in fields]

    def steps(self, x: Tensor) -> Tensor:
        """The nearest value of each x [g, w], counted in steps from 0 (shift: from the shift): a new tensor."""
        spec, offset = self.spec, self.offset
        if offset is None:
            steps = (x * self.factor).clamp_(spec.qmin, spec.qmax)
            return steps.round_() if spec.format.kind == "int" else round_float(steps, spec.format)
        if spec.scheme == "shift":
            return (x - offset).mul_(self.factor).round_().clamp_(0, spec.qmax)
        return (x * self.factor).round_().add_(offset).clamp_(0, spec.qmax).sub_(offset)

    def values(self, steps: Tensor) -> Tensor:
        """What so many steps stand for: a new tensor."""
        values = steps * self.scale
        return values.add_(self.offset) if self.offset is not None and self.spec.scheme == "shift" else values

    def residual_steps(self, x: Tensor) -> Tensor:
        """The nearest value of each x, less x, counted in steps: a new tensor. Cheaper than `steps` and `values`."""
        spec, offset = self.spec, self.offset
        if spec.scheme == "shift" and offset is not None:
            exact = (x - offset).mul_(self.factor)
        else:
            exact = x * self.factor
            if offset is not None:
                exact.add_(offset)
        rounded = exact.clamp(spec.qmin, spec.qmax)
        rounded = rounded.round_() if spec.format.kind == "int" else round_float(rounded, spec.format)
        return rounded.sub_(exact)


def grid_of(ranges: Range, spec: TensorSpec, tensor_scale: Tensor | None) -> Grid:
    """The grid that encode and decode give to granules of those ranges, [..., g, 1] a side."""
    scales = scales_of(ranges, spec, tensor_scale)
    scale = scales.scale.to(torch.float32)
    return Grid(
        spec,
        scale if tensor_scale is None or not spec.has_tensor_scale else scale * tensor_scale,
        scales.factor,
        scales.offset,
    )


def round_float(x: Tensor, number: NumberFormat) -> Tensor:
    """The nearest value of a float format to each x within [qmin, qmax], in float32: in place, half to even.

    Where the format has no mantissa bits there is no even neighbour: of two that are equally near, the larger one.
    """
    smallest_normal = 2.0 ** (1 - number.bias)
    if not number.is_small_float:
        smallest_normal = torch.finfo(number.storage).smallest_normal
    # 2**exponent of each x; times 1.5 * 2**(23 - mantissa bits) it is a number whose unit in the last place is the
    # format's step around x, so that adding it rounds.
    big = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    big.clamp_(min=smallest_normal).mul_(1.5 * 2.0 ** (23 - number.mantissa_bits))
    return x.add_(big).sub_(big)
