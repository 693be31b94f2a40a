"""QuantizedTensor: a quantized matrix as plain tensors, apart from any module and any kernel's layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant import ops  # noqa: F401  (declares torch.ops.fxquant)
from fxquant.errors import ShapeMismatch
from fxquant.numerics import decode
from fxquant.spec import TensorSpec

_FXQUANT = torch.ops.fxquant
# What gives int8 rows their codes by default: the kernel that quantizes activations token by token gives the same bits.
_BY_ROW_KERNEL = ("auto", "absmax")


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix [N, K] of codes with the numbers of their granules.

    codes         [N, K], one code an element, in ``spec.code_dtype``.
    scale         in the shape that the granularity gives of [N, K], in ``spec.scale_dtype``.
    zero_point    like scale, uint8 (affine) or the scale's dtype (shift); None if symmetric.
    tensor_scale  float32 [1, 1] if the spec has one, else None.
    """

    spec: TensorSpec
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None

    @staticmethod
    def quantize(weight: Tensor, spec: TensorSpec | str, algorithm: str = "auto") -> QuantizedTensor:
        """Choose the codes of a float matrix [N, K] by the algorithm of that name (see `fxquant.algorithms`).

        Raises `ShapeMismatch` if it is no matrix, or one that cannot have the spec's granularity.
        """
        spec, matrix = TensorSpec.parse(spec) if isinstance(spec, str) else spec, weight.detach()
        if matrix.dim() != 2:
            raise ShapeMismatch("QuantizedTensor.quantize", f"a tensor {list(matrix.shape)}", "a matrix [N, K]")
        if str(spec) == "int8/channel" and algorithm in _BY_ROW_KERNEL and matrix.dtype is not torch.float64:
            codes, scale = _FXQUANT.int8_quantize_per_token(matrix)
            return QuantizedTensor(spec, codes, scale)
        codes, scale, zero_point, tensor_scale = _FXQUANT.quantize_weight(matrix, str(spec), algorithm)
        return QuantizedTensor(
            spec,
            codes,
            scale,
            zero_point if spec.has_zero_point else None,
            tensor_scale if spec.has_tensor_scale else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Bytes in the storage form: codes at the bits of their format, and all scales."""
        return self.spec.nbytes(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [N, K] that the codes stand for, computed in float32, rounded once to `dtype`."""
        return decode(self.codes, self.scale, self.zero_point, self.spec, dtype, self.tensor_scale)
